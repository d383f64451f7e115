"""Fairness between tenants: a prefill instance counts what is generated after the prompts that it computes, wherever that is."""

from __future__ import annotations

import random

import pytest

from fastdeploy_pd.engine.roles import Role
from tests.engine.simulated_cluster import Faults, SimulatedCluster, expected_tokens


@pytest.mark.parametrize("seed", range(6))
def test_prefill_counts_what_decode_generates(seed: int) -> None:
    faults = Faults(drop=0.05, repeat=0.1, late=0.1, until_s=1e9) if seed % 2 else Faults(until_s=0)
    cluster = SimulatedCluster(seed, [Role.PREFILL, Role.DECODE, Role.DECODE], faults, 60, 1, fairness="vtc")
    rng, prompts = random.Random(seed), {"a": list[list[int]](), "b": list[list[int]]()}
    for number in range(24):
        tenant, prompt = "ab"[number % 2], [rng.randrange(1, 900) for _ in range(rng.randint(5, 18))]
        prompts[tenant].append(prompt)
        cluster.submit(f"r{number}", prompt, 2 if tenant == "a" else 30, 0.4 * number, tenant=tenant)
    cluster.run(400)
    assert all(c.num_terminal == 1 and c.error is None for c in cluster.clients.values())
    (prefill,) = (n.engine.context.scheduler for n in cluster.nodes.values() if n.engine.role is Role.PREFILL)
    heard = prefill._counters._heard  # type: ignore[union-attr]
    for tenant, most in (("a", 2), ("b", 30)):
        # The first token of each is prefill's own.
        generated = sum(len(expected_tokens(p, most)) - 1 for p in prompts[tenant])
        told = sum(n for (_, t), n in heard.items() if t == tenant)
        # Each decode instance will tell the rest, of its newest prompts, with its next order.
        assert generated - 2 * 3 * (most - 1) <= told <= generated
    assert told > 60
