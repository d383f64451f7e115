"""A peer that knows the secret and has gone mad: what it says ends the attempt that it is about, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastdeploy_pd.cluster.codec import decode, encode
from fastdeploy_pd.cluster.messages import HandOver, Message
from fastdeploy_pd.engine.context import EngineOptions
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import ProtocolError
from fastdeploy_pd.observe.metrics import EngineMetrics
from tests.engine.simulated_cluster import Faults, SimulatedCluster, expected_tokens


def change_first(cluster: SimulatedCluster, change: Callable[[HandOver], HandOver]) -> list[Message]:
    """The first hand-over to each instance is another than was sent. Returns: those that were changed, as time goes on."""
    changed: list[Message] = []
    arrive = cluster.arrive

    def arrive_changed(sender_id: str, peer_id: str, message: Message) -> None:
        if isinstance(message, HandOver) and not changed:
            message = change(message)
            changed.append(message)
            try:
                message = decode(encode(message))
            except ProtocolError:
                return
        arrive(sender_id, peer_id, message)

    cluster.arrive = arrive_changed  # type: ignore[method-assign]
    return changed


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_hand_over_with_other_than_one_token(num_tokens: int) -> None:
    cluster = SimulatedCluster(1, [Role.PREFILL, Role.DECODE], Faults(until_s=0), options=EngineOptions())
    changed = change_first(cluster, lambda m: replace(m, chunk=replace(m.chunk, token_ids=(5,) * num_tokens)))
    cluster.submit("r", [7] * 9, 5, 0.5)
    cluster.run(60)
    assert changed and cluster.clients["r"].tokens == expected_tokens([7] * 9, 5) and cluster.is_quiet()


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**63])
def test_a_hand_over_with_a_token_that_no_model_has(token_id: int) -> None:
    """It would be hashed with its block, much later."""
    cluster = SimulatedCluster(1, [Role.PREFILL, Role.DECODE], Faults(until_s=0), options=EngineOptions())
    changed = change_first(cluster, lambda m: replace(m, chunk=replace(m.chunk, token_ids=(token_id,))))
    cluster.submit("r", [7] * 9, 40, 0.5)
    cluster.run(60)
    assert changed and cluster.clients["r"].tokens == expected_tokens([7] * 9, 40) and cluster.is_quiet()


def test_a_hand_over_by_what_nobody_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics have a series for each backend."""
    cluster = SimulatedCluster(1, [Role.PREFILL, Role.DECODE], Faults(until_s=0), options=EngineOptions())
    backends = []
    for node in cluster.nodes.values():
        monkeypatch.setattr(node.engine.context.observer, "handover", lambda *told: backends.append(told[-1]))
    changed = change_first(cluster, lambda m: replace(m, backend="what is this"))
    cluster.submit("r", [7] * 9, 5, 0.5)
    cluster.run(60)
    assert changed and cluster.clients["r"].tokens == expected_tokens([7] * 9, 5) and cluster.is_quiet()
    assert "what is this" not in backends


def test_a_hand_over_of_less_than_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    cluster = SimulatedCluster(1, [Role.PREFILL, Role.DECODE], Faults(until_s=0), options=EngineOptions())
    for node in cluster.nodes.values():
        node.engine.context.observer = EngineMetrics("model", "mixed")
    changed = change_first(cluster, lambda m: replace(m, num_bytes=-1))
    cluster.submit("r", [7] * 9, 5, 0.5)
    cluster.run(60)
    assert changed and cluster.clients["r"].tokens == expected_tokens([7] * 9, 5) and cluster.is_quiet()
