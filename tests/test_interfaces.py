"""Addresses of network interfaces, and what an instance takes for its own."""

from __future__ import annotations

import socket

import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.interfaces import address_of, interface_of

SECRET = "sixteen bytes and more"
FLAGS = ["--splitwise-role", "prefill", "--scheduler-name", "splitwise"]


def test_interfaces_and_addresses_find_each_other() -> None:
    assert address_of("lo") == "127.0.0.1" and interface_of("127.0.0.1") == interface_of("localhost") == "lo"
    assert address_of("no such one") == address_of("") == interface_of("203.0.113.9") == ""
    for _, name in socket.if_nameindex():
        if address := address_of(name):
            assert interface_of(address)


def test_an_instance_s_address_is_that_of_its_socket_interface_unless_said_otherwise() -> None:
    def advertised(interface: str, *flags: str) -> str:
        env = {"KVCACHE_SOCKET_IFNAME": interface, "FD_CLUSTER_SECRET": SECRET}
        return InstanceConfig.from_args([*FLAGS, *flags], env).cluster.advertise_host

    assert advertised("lo") == advertised("") == "127.0.0.1"
    assert advertised("nonsense", "--advertise-host", "10.0.0.1") == "10.0.0.1"
    with pytest.raises(ConfigError, match=r"KVCACHE_SOCKET_IFNAME is 'nonsense', .* there are: .*lo"):
        advertised("nonsense")
    with pytest.raises(ConfigError, match="which is no network interface"):
        advertised("lo\udcff")  # as bytes that are no text look in os.environ
    for nowhere in ("0.0.0.0", "::", "*"):
        with pytest.raises(ConfigError, match="must be one of this machine's addresses"):
            advertised("", "--advertise-host", nowhere)
    other = next((name for _, name in socket.if_nameindex() if name != "lo" and address_of(name)), "")
    if other:
        assert advertised(other) == address_of(other)
        with pytest.raises(ConfigError, match="needs a cluster secret"):
            InstanceConfig.from_args(FLAGS, {"KVCACHE_SOCKET_IFNAME": other})
