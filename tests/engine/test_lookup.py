"""A front end finds who holds a request's prefix, and hashes no more than that takes."""

from __future__ import annotations

import random

from fastdeploy_pd.cluster.messages import Beat, Peer, Reserve
from fastdeploy_pd.core.blocks import extend_hashes
from fastdeploy_pd.core.prefix_index import KEY_BYTES
from fastdeploy_pd.engine.frontend import FrontEnd, Instance
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.request import Request, SamplingParams

BLOCK = 16


def front_end_over(*sizes: int) -> FrontEnd:
    front_end = FrontEnd("front", random.Random(1))
    peers = [Peer(f"m{number}", "sim://") for number in range(len(sizes))]
    front_end.set_members(
        [Instance(p, can_prefill=True, can_decode=True, block_size=s) for p, s in zip(peers, sizes, strict=True)], 0.0
    )
    front_end.outbox.take()
    return front_end


def hold(front_end: FrontEnd, instance_id: str, tokens: list[int], salt: str = "", size: int = BLOCK) -> None:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, size, salt)
    front_end.prefixes.reset(instance_id, 0, b"".join(h[:KEY_BYTES] for h in hashes))


def placed_on(front_end: FrontEnd, number: int, tokens: list[int], **changes: object) -> str:
    front_end.submit(Request(f"r{number}", tokens, SamplingParams(max_tokens=4), **changes), 0.0)
    sent = [a for a in front_end.outbox.take() if isinstance(a, Send) and isinstance(a.message, Reserve)]
    front_end.abort(f"r{number}", 0.0)
    return sent[-1].peer_id


def test_an_instance_whose_device_hangs_is_not_found_again_by_its_beats() -> None:
    """Its process beats on, and its counter stands still; when that moves, it is back."""
    front_end, placed = front_end_over(BLOCK, BLOCK), []
    for turn in range(400):
        now_s = 0.05 * turn
        front_end.receive("m0", Beat(turn, 100_000), now_s)
        front_end.receive("m1", Beat(7 if turn < 300 else turn, 0), now_s)
        front_end.tick(now_s)
        if turn % 20 == 0:
            placed.append((now_s, placed_on(front_end, turn, [1] * 10)))
    assert {name for now_s, name in placed if 5.0 < now_s < 15.0} == {"m0"}
    assert {name for now_s, name in placed if now_s > 15.1} == {"m1"}


def test_holder_is_chosen_under_its_salt_only() -> None:
    front_end, prompt = front_end_over(BLOCK, BLOCK, BLOCK), list(range(40 * BLOCK))
    hold(front_end, "m1", prompt, "tenant")
    assert placed_on(front_end, 0, prompt, cache_salt="tenant") == "m1"
    others = set()
    for number in range(30):
        front_end = front_end_over(BLOCK, BLOCK, BLOCK)
        front_end._rng.seed(number)
        hold(front_end, "m1", prompt, "tenant")
        others.add(placed_on(front_end, number, prompt))
    assert others == {"m0", "m1", "m2"}


def test_unknown_prompts_are_hardly_hashed() -> None:
    front_end, prompt = front_end_over(BLOCK, BLOCK), list(range(1000 * BLOCK))
    request = Request("r", prompt)
    assert not front_end.look_up(request)  # nobody publishes
    hold(front_end, "m0", prompt[: 100 * BLOCK])
    stranger = Request("s", prompt[1:])
    while front_end.look_up(stranger):
        pass
    assert len(stranger.local.block_hashes) == 4
    num_calls = 0
    while front_end.look_up(request):
        num_calls += 1
    assert 100 <= len(request.local.block_hashes) <= 200
    assert num_calls < 10
    assert front_end._cached_tokens(request) == {"m0": 100 * BLOCK}


def test_one_token_is_left_to_compute() -> None:
    front_end, prompt = front_end_over(BLOCK), list(range(8 * BLOCK))
    hold(front_end, "m0", prompt)
    assert front_end._cached_tokens(Request("r", prompt)) == {"m0": 7 * BLOCK}


def test_another_block_size_is_not_looked_up() -> None:
    front_end, prompt = front_end_over(BLOCK, BLOCK, 32), list(range(8 * BLOCK))
    hold(front_end, "m2", prompt, size=32)
    assert front_end._cached_tokens(Request("r", prompt)) == {}
    hold(front_end, "m0", prompt)
    assert front_end._cached_tokens(Request("r2", prompt)) == {"m0": 7 * BLOCK}
