"""Who may speak: key pairs for ZeroMQ's CURVE, derived from the cluster secret.

Every process of a cluster derives the same server and the same client key pair. A server accepts the cluster's client key alone; a
client talks only to a server that holds the server key. Source: RFC 5869 (HKDF), ZeroMQ RFC 25 and 26 (CURVE), 27 (ZAP).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from fastdeploy_pd.errors import ConfigError

MIN_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True, repr=False)
class KeyPair:
    """A CURVE key pair in Z85."""

    public: bytes
    secret: bytes


def derive(secret: bytes, purpose: str, num_bytes: int = 32) -> bytes:
    """Returns: key material for one purpose. HKDF-SHA256 with one block of output.

    Raises: ConfigError: the secret is too short.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"the cluster secret has {len(secret)} bytes; it must have at least {MIN_SECRET_BYTES}")
    extracted = hmac.new(b"fastdeploy-pd/1", secret, hashlib.sha256).digest()
    return hmac.new(extracted, purpose.encode() + b"\x01", hashlib.sha256).digest()[:num_bytes]


def key_pair(secret: bytes, purpose: str) -> KeyPair:
    """Returns: the cluster's key pair for "server" or "client"."""
    private = z85.encode(derive(secret, f"curve-{purpose}"))
    return KeyPair(zmq.curve_public(private), private)


def refuse_open_bind(endpoint: str, has_secret: bool) -> None:
    """Raises: ConfigError: the endpoint is reachable from other machines and there is no secret."""
    parts = urlsplit(endpoint.replace("*", "0"))
    if parts.scheme != "tcp" or has_secret:
        return
    try:
        is_loopback = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        is_loopback = parts.hostname == "localhost"
    if not is_loopback:
        raise ConfigError(
            f"{endpoint} can be reached from other machines; without a cluster secret (--cluster-secret-file or FD_CLUSTER_SECRET) "
            "instances listen on loopback addresses only"
        )
