"""Which runner computes where, and why one cannot."""

from __future__ import annotations

import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.engine.build import load_model
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.flags import DEMO_MODEL
from fastdeploy_pd.model import select
from fastdeploy_pd.model.parallel import Rank
from rdma_comm.cuda.driver import CudaUnavailable

paddle = pytest.importorskip("paddle")


class Card:
    """Stands for a GPU that this machine has not got."""

    name = "NVIDIA H200"
    capability = (9, 0)

    def attribute(self, number: int) -> int:
        return {75: self.capability[0], 76: self.capability[1]}[number]


class OldCard(Card):
    """One before Ada Lovelace."""

    name = "NVIDIA A100"
    capability = (8, 0)


def refusal() -> str:
    with pytest.raises(ConfigError, match="--ops is 'paddle'; with --device cuda it must be torch: ") as caught:
        select.make_runner(DEMO_MODEL, "paddle", device="cuda")
    return caught.value.message.partition("torch: ")[2]


def test_paddle_on_a_gpu_is_refused_with_the_build_and_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    version = paddle.__version__
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    assert refusal() == f"this Paddle ({version}) was built without CUDA"
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.version, "cuda", lambda: "12.6")
    monkeypatch.setattr(paddle.version, "cuda_archs", lambda: [86, 80])
    monkeypatch.setattr(select, "Gpu", Card)
    has = f"this Paddle ({version}, CUDA 12.6) has kernels for sm_80, sm_86"
    assert refusal() == f"{has}, and the card is an NVIDIA H200, sm_90"
    monkeypatch.setattr(paddle.version, "cuda_archs", lambda: [90])
    assert refusal().endswith("sm_90, the NVIDIA H200's among them, but this version computes with it on CPUs alone")

    def none() -> None:
        raise CudaUnavailable("there is no driver")

    monkeypatch.setattr(select, "Gpu", none)
    assert refusal().endswith("sm_90, and no card can be used: there is no driver")


def test_the_reference_on_a_gpu_is_a_wrong_flag() -> None:
    with pytest.raises(ConfigError, match="--ops is 'reference'; with --device cuda it must be torch"):
        InstanceConfig.from_args(["--device", "cuda", "--ops", "reference"], {})


@pytest.mark.parametrize(
    ("capability", "is_enough"),
    [((7, 5), False), ((8, 0), False), ((8, 8), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)],
)
def test_fp8_needs_a_card_that_has_it(capability: tuple[int, int], is_enough: bool) -> None:
    if is_enough:
        select.check_fp8("card", capability)
        return
    with pytest.raises(ConfigError, match=rf"on this card, of compute capability {capability[0]}\.{capability[1]}, it"):
        select.check_fp8("card", capability)


def test_an_instance_on_an_old_card_refuses_fp8_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdeploy_pd.model.ops.torch.find_device", lambda name: None)
    monkeypatch.setattr(select, "Gpu", OldCard)
    config = InstanceConfig.from_args(["--device", "cuda", "--kv-cache-dtype", "fp8_e4m3"], {})
    with pytest.raises(ConfigError) as caught:
        load_model(config, Rank())
    assert caught.value.message == (
        "--kv-cache-dtype is 'fp8'; on this NVIDIA A100, of compute capability 8.0, it must be auto (fp8 needs 8.9 or more)"
    )
