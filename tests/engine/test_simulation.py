"""The whole cluster in one thread, from a seed: nothing lost, nothing twice, whatever happens to messages and instances."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from fastdeploy_pd.cluster.messages import Refused
from fastdeploy_pd.core.placement import Placement
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.engine.context import EngineOptions
from fastdeploy_pd.engine.roles import Role
from tests.engine.simulated_cluster import BAD_TOKEN, STEP_S, Faults, SimulatedCluster, expected_tokens
from tests.engine.test_fetch import Fixed

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LIMIT_S = 400.0


@pytest.fixture(params=[0, 2], ids=["at-once", "two-steps"])
def depth(request: pytest.FixtureRequest) -> int:
    """Of the runners, see SimulatedCluster."""
    return int(request.param)


def run_one(
    seed: int,
    roles: list[Role],
    faults: Faults,
    depth: int,
    num_requests: int = 8,
    num_aborts: int = 0,
    num_blocks: int = 24,
    options: EngineOptions | None = None,
    predictor: Predictor | None = None,
    num_host_blocks: int = 0,
) -> SimulatedCluster:
    """Run one schedule and check what every schedule must fulfil."""
    rng = random.Random(seed)
    more = {"options": options, "predictor": predictor, "num_host_blocks": num_host_blocks}
    cluster = SimulatedCluster(seed, roles, faults, num_blocks, depth=depth, **more)
    shared = [rng.randrange(1, 900) for _ in range(9)]
    for number in range(num_requests):
        prompt = (shared if rng.random() < 0.5 else []) + [rng.randrange(1, 900) for _ in range(rng.randint(1, 18))]
        cluster.submit(
            f"r{number}",
            prompt,
            rng.randint(1, 9),
            rng.uniform(0.5, 8),
            salt=rng.choice(["", "", "tenant"]),
            on_host=rng.random() < 0.3,
        )
    for number in rng.sample(range(num_requests), num_aborts):
        cluster.abort(f"r{number}", rng.uniform(0.5, 10))
    cluster.run(LIMIT_S)
    for request_id, client in cluster.clients.items():
        expected = expected_tokens(client.prompt, client.max_tokens)
        assert client.num_terminal == 1, f"seed {seed}: {request_id} never ended"
        assert client.tokens == expected[: len(client.tokens)], f"seed {seed}: {request_id} has wrong tokens"
        if not client.was_aborted:
            assert client.error is None, f"seed {seed}: {request_id} failed: {client.error}"
            assert client.tokens == expected, f"seed {seed}: {request_id} is incomplete"
    assert cluster.is_quiet(), f"seed {seed}: blocks are still held"
    return cluster


@pytest.mark.parametrize(
    "roles", [[P, D], [P, P, D, D], [M], [M, P, D]], ids=lambda roles: "".join(r.value[0] for r in roles)
)
def test_tokens_are_right_without_faults(roles: list[Role], depth: int) -> None:
    for seed in range(10):
        run_one(seed, roles, Faults(until_s=0), depth)


@pytest.mark.parametrize(
    "roles", [[P, D], [P, P, D, D], [M, P, D]], ids=lambda roles: "".join(r.value[0] for r in roles)
)
def test_dropped_late_and_repeated_messages(roles: list[Role], depth: int) -> None:
    for seed in range(40):
        run_one(seed, roles, Faults(drop=0.05, repeat=0.1, late=0.1, until_s=40), depth)


def test_killed_instances(depth: int) -> None:
    num_kills = 0
    for seed in range(40):
        num_kills += run_one(seed, [P, P, D, D], Faults(kill_every_s=2.0, until_s=30), depth).num_kills
    assert num_kills > 200


def test_everything_at_once(depth: int) -> None:
    for seed in range(60):
        run_one(
            seed,
            [P, P, D, D, M],
            Faults(drop=0.03, repeat=0.05, late=0.05, kill_every_s=3.0, corrupt=0.02, until_s=40),
            depth,
            num_aborts=3,
        )


@pytest.mark.parametrize("roles", [[P, D, M], [P, P, D, D], [M, M]], ids=lambda r: "".join(x.value[0] for x in r))
def test_roles_change_all_the_time(roles: list[Role], depth: int) -> None:
    num_flips = 0
    for seed in range(30):
        num_flips += run_one(seed, roles, Faults(flip_every_s=0.3, until_s=20), depth).num_flips
    assert num_flips > 1000


def test_instances_drain_one_after_the_other(depth: int) -> None:
    num_drains = 0
    for seed in range(30):
        num_drains += run_one(seed, [P, P, D, D], Faults(drain_every_s=1.0, until_s=20), depth).num_drains
    assert num_drains > 300


def test_roles_change_while_everything_goes_wrong(depth: int) -> None:
    """300 seeds and more, with the tests around: 0 lost, 0 twice, 0 wrong, 0 leaked."""
    for seed in range(150):
        faults = Faults(
            drop=0.03, repeat=0.05, late=0.05, kill_every_s=4.0, flip_every_s=0.7, drain_every_s=5.0, corrupt=0.01, until_s=20
        )  # fmt: skip
        run_one(seed, [P, D, M] if seed % 2 else [P, P, D, D], faults, depth, num_aborts=2)


FETCHES = EngineOptions(min_fetch_tokens=4, local_prefill_tokens=12)


@pytest.mark.parametrize(
    "roles",
    [[M, M, M], [D, D], [P, P, D], [P, P, D, D], [M, P, D]],
    ids=lambda roles: "".join(r.value[0] for r in roles),
)
def test_prefixes_are_fetched_from_peers(roles: list[Role], depth: int) -> None:
    num_fetched = 0
    for seed in range(20):
        cluster = run_one(seed, roles, Faults(until_s=0), depth, num_requests=20, options=FETCHES)
        num_fetched += cluster.fetches.num_fetched
    assert num_fetched >= 10


def test_fetches_while_everything_goes_wrong(depth: int) -> None:
    """Dropped, late and repeated messages, killed instances, damaged blocks, stale indexes, pools that evict, aborts."""
    num_fetched, failures = 0, Counter[str]()
    for seed in range(40):
        faults = Faults(drop=0.05, repeat=0.1, late=0.1, kill_every_s=2.0, corrupt=0.05, until_s=40)
        roles = [[M, M, P, D, D], [M, M, M], [P, P, P, D]][seed % 3]
        cluster = run_one(seed, roles, faults, depth, 24, num_aborts=4, num_blocks=18, options=FETCHES)
        num_fetched += cluster.fetches.num_fetched
        failures += cluster.fetches.failures
    assert num_fetched > 60
    assert {"checksum_mismatch", "prefill_lost"} <= set(failures)


@pytest.mark.parametrize(
    "roles", [[P, D], [P, P, D, D], [M, P, D], [M, M]], ids=lambda r: "".join(x.value[0] for x in r)
)
def test_slo_policies_while_everything_goes_wrong(roles: list[Role], depth: int) -> None:
    """Prompts overtake each other and wait for streams, decode instances compute prompts; everything else as above."""
    predictor = Predictor((1e-6, STEP_S / 16, STEP_S / 4), (1e-6, STEP_S / 8, STEP_S / 4))
    for seed in range(30):
        faults = Faults(drop=0.03, repeat=0.05, late=0.05, kill_every_s=4.0, corrupt=0.01, until_s=20)
        run_one(seed, roles, faults if seed % 3 else Faults(until_s=0), depth, 16, num_aborts=2, predictor=predictor)


def test_blocks_come_back_from_host_memory_while_everything_goes_wrong(depth: int) -> None:
    num_hits = num_fetched = 0
    for seed in range(30):
        faults = Faults(drop=0.03, repeat=0.05, late=0.05, kill_every_s=4.0 * (seed % 2), corrupt=0.02, until_s=30)
        cluster = run_one(
            seed, [M, P, D], faults, depth, 24, num_aborts=3, num_blocks=16, options=FETCHES, num_host_blocks=8
        )
        num_hits += sum(n.engine.context.scheduler.num_swap_hits for n in (*cluster.nodes.values(), *cluster.dead))
        num_fetched += cluster.fetches.num_fetched
    assert num_hits > 40 and num_fetched > 10


def test_aborts_leave_every_block_free(depth: int) -> None:
    for seed in range(40):
        run_one(seed, [P, D], Faults(late=0.1, until_s=20), depth, num_requests=12, num_aborts=12)


def test_pool_so_small_that_requests_are_preempted(depth: int) -> None:
    num_preemptions = 0
    for seed in range(20):
        cluster = run_one(seed, [P, D], Faults(until_s=0), depth, num_requests=24, num_blocks=12)
        num_preemptions += sum(n.engine.context.scheduler.num_preemptions for n in cluster.nodes.values())
    assert num_preemptions > 0


@pytest.mark.parametrize("roles", [[P, D], [M]], ids=["pd", "m"])
def test_one_bad_sequence_fails_alone(roles: list[Role], depth: int) -> None:
    """Its neighbours in the batch go on, it ends once with an error, and nobody is given the blocks it spoilt."""
    cluster = SimulatedCluster(3, roles, Faults(until_s=0), 64, depth=depth)
    shared = list(range(100, 109))
    for number in range(6):
        cluster.submit(f"good{number}", [*shared, 7 + number], 9, 1.0)
    cluster.submit("bad", [*shared, 4, 5, 6, BAD_TOKEN], 9, 1.0)
    cluster.submit("bad-later", [*shared, 4, 5, 6, BAD_TOKEN], 9, 5.0)
    cluster.submit("good-later", [*shared, 4, 5, 6], 9, 5.0)
    cluster.run(LIMIT_S)
    for request_id, client in cluster.clients.items():
        assert client.num_terminal == 1
        if request_id.startswith("bad"):
            assert client.error is not None and client.error.code == "bad_logits"
        else:
            assert client.error is None
            assert client.tokens == expected_tokens(client.prompt, client.max_tokens)
    assert cluster.is_quiet()


def test_a_request_that_kills_prefill_instances_is_given_up() -> None:
    cluster = SimulatedCluster(1, [P, P, D], Faults(until_s=0), num_front_ends=1, max_lost_instances=6)
    cluster.submit("poison", [3, 1, 4], 5, 1.0)
    front_end = next(iter(cluster.front_ends.values()))

    def lose() -> None:
        tracked = front_end.requests.get("poison")
        if tracked is not None and tracked.placement is not None:
            message = Refused("poison", tracked.request.attempt, "the prefill instance was lost", "prefill_lost")
            front_end.receive(tracked.decode_id, message, cluster.clock.now_s())

    for number in range(200):
        cluster.at(1.001 + 0.005 * number, lose)
    cluster.run(LIMIT_S)
    error = cluster.clients["poison"].error
    assert error is not None and error.code == "poison"
    assert cluster.is_quiet()


def test_a_prefill_instance_with_a_shorter_limit_cuts_no_answer() -> None:
    cluster = SimulatedCluster(1, [P, D], Faults(until_s=0))
    scheduler = next(iter(cluster.nodes.values())).engine.context.scheduler
    scheduler.options = replace(scheduler.options, max_model_len=16)
    for num_tokens in range(13, 18):
        cluster.submit(f"r{num_tokens}", [7] * num_tokens, 5, 0.5)
    cluster.run(60)
    for client in cluster.clients.values():
        assert client.tokens == expected_tokens(client.prompt, 5)


def test_instances_that_wait_for_each_other_s_blocks_go_on() -> None:
    cluster = SimulatedCluster(1, [M, M], Faults(until_s=0))
    one, other = cluster.nodes
    for front_end, ids in zip(cluster.front_ends.values(), ((one, other), (other, one)), strict=True):
        front_end.policy = Fixed(Placement(*ids))  # a policy of a user's may
    for number in range(12):
        cluster.submit(f"r{number}", [number] * 34, 5, 0.3)
    cluster.run(60)
    for client in cluster.clients.values():
        assert client.tokens == expected_tokens(client.prompt, 5)
