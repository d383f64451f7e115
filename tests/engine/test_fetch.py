"""A prefix that a peer has is fetched from it: all of it, what is left of it, or, if nothing comes, none."""

from __future__ import annotations

import random
from collections.abc import Collection

from fastdeploy_pd.cluster.messages import CancelOrder, FetchOrder, HandOver, Message, OrderEnded, PrefillOrder, Reserve
from fastdeploy_pd.core.placement import Candidate, Placement
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.engine.context import EngineOptions
from fastdeploy_pd.engine.decode import Served, ServedState
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.engine.prefill import Order, OrderState
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.request import Phase, Request, SamplingParams, Slo
from tests.engine.simulated_cluster import BLOCK_SIZE, Faults, Node, SimulatedCluster, expected_tokens

OPTIONS = EngineOptions(min_fetch_tokens=BLOCK_SIZE, local_prefill_tokens=6)
PROMPT = list(range(1, 31))  # 7 full blocks and 2 tokens


class Fixed:
    """Places everything in one way."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def place(
        self, num_tokens: int, candidates: Collection[Candidate], rng: random.Random, slo: Slo, age_s: float
    ) -> Placement | None:
        """See PlacementPolicy."""
        return self.placement if self.placement.decode_id in {c.instance_id for c in candidates} else None


class Scene:
    """Instances of which the first has computed PROMPT; what follows goes to the second, whose front end knows that."""

    def __init__(self, *roles: Role, options: EngineOptions = OPTIONS) -> None:
        self.cluster = SimulatedCluster(1, roles, Faults(until_s=0), num_front_ends=1, options=options)
        self.front_end = next(iter(self.cluster.front_ends.values()))
        self.ids = list(self.cluster.nodes)
        self.holder, self.other = (self.cluster.nodes[i] for i in self.ids[:2])
        self.ask("first", PROMPT, Placement(None, self.ids[0]))
        self.wait_published()
        assert self.front_end.prefixes.num_blocks(self.ids[0]) == 8  # of prompt and output

    def ask(self, name: str, prompt: list[int], placement: Placement) -> None:
        self.front_end.policy = Fixed(placement)
        self.cluster.submit(name, prompt, 5, 0.3)
        self.cluster.run(self.cluster.clock.now_s() + 60)
        client = self.cluster.clients[name]
        assert client.num_terminal == 1 and client.tokens == expected_tokens(prompt, 5)
        assert self.cluster.is_quiet()

    def wait_published(self) -> None:
        published_s = self.cluster.clock.now_s() + 1.0
        while self.cluster.clock.now_s() < published_s:
            self.cluster.run(published_s)

    def forget(self, node: Node) -> None:
        """An instance's cache is emptied, and its front end knows it."""
        node.engine.context.scheduler.pool.forget_all()
        self.wait_published()

    def requests(self, node: Node) -> list[Request]:
        """What an instance has served, in order."""
        return [s.request for s in node.engine.decode.served.values()]

    def ordered(self, instance_id: str) -> list[int]:
        """How many tokens of each prompt ordered from an instance it found or was sent."""
        orders = self.cluster.nodes[instance_id].engine.prefill.orders.values()
        return [o.request.local.num_cached_tokens for o in orders if o.request is not None]


def test_all_of_it() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    scene.ask("again", [*PROMPT, 7, 8, 9], Placement(None, scene.ids[1]))
    assert scene.cluster.fetches.num_fetched == 1
    (request,) = scene.requests(scene.other)
    assert request.local.num_cached_tokens == 28
    scene.ask("here", [*PROMPT, 7, 8, 10], Placement(None, scene.ids[1]))
    assert scene.cluster.fetches.num_fetched == 1  # it can be found here now


def test_what_is_left_of_it() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    pool = scene.holder.engine.context.scheduler.pool
    hashes = scene.requests(scene.holder)[0].local.block_hashes
    pool.listener = None  # the front end's index is stale
    pool.forget(pool.find_prefix(hashes)[4:])
    scene.ask("again", PROMPT, Placement(None, scene.ids[1]))
    (request,) = scene.requests(scene.other)
    assert request.local.num_cached_tokens == 16 and scene.cluster.fetches.num_fetched == 1
    assert not scene.cluster.fetches.failures
    pool.forget_all()
    scene.forget(scene.other)
    scene.ask("none", PROMPT, Placement(None, scene.ids[1]))
    assert scene.requests(scene.other)[1].local.num_cached_tokens == 0
    assert scene.cluster.fetches.failures == {"prefill_failed": 1}


def test_decode_fetches_when_little_is_left_to_compute_and_orders_a_prefill_otherwise() -> None:
    scene = Scene(Role.MIXED, Role.DECODE, Role.PREFILL)
    placement = Placement(scene.ids[2], scene.ids[1])
    scene.ask("long", [*PROMPT, *range(50, 60)], placement)
    assert scene.cluster.fetches.num_fetched == 1
    assert scene.ordered(scene.ids[2]) == [28], "prefill has fetched it, and computed the rest"
    scene.forget(scene.other)
    scene.ask("short", [*PROMPT, 7], placement)
    assert scene.cluster.fetches.num_fetched == 2
    assert len(scene.ordered(scene.ids[2])) == 1
    scene.ask("cached", [*PROMPT, 8], placement)  # nothing to fetch any more, and little to compute
    assert scene.cluster.fetches.num_fetched == 2
    assert len(scene.ordered(scene.ids[2])) == 1


def test_prefill_fetches_what_decode_has_and_writes_what_decode_has_not() -> None:
    scene = Scene(Role.DECODE, Role.PREFILL)
    decode_id, prefill_id = scene.ids
    scene.ask("long", [*PROMPT, *range(50, 60)], Placement(prefill_id, decode_id))
    assert scene.ordered(prefill_id) == [28]
    (order,) = scene.other.engine.prefill.orders.values()
    assert order.first_block == 7, "decode had the others"
    scene.ask("longer", [*PROMPT, *range(50, 60), *range(12)], Placement(prefill_id, decode_id))
    assert scene.cluster.fetches.num_fetched == 1, "prefill holds as much as decode"


def test_prefill_computes_what_a_holder_does_not_send() -> None:
    scene = Scene(Role.MIXED, Role.DECODE, Role.PREFILL)
    receive = scene.holder.engine.receive
    scene.holder.engine.receive = lambda i, m: None if isinstance(m, FetchOrder | CancelOrder) else receive(i, m)  # type: ignore[method-assign]
    prompt, placement = [*PROMPT, *range(50, 60)], Placement(scene.ids[2], scene.ids[1])
    started_s = scene.cluster.clock.now_s()
    scene.ask("silent", prompt, placement)
    assert scene.cluster.fetches.failures == {"transfer_timeout": 1} and scene.ordered(scene.ids[2]) == [0]
    assert scene.cluster.clock.now_s() - started_s < OPTIONS.fetch_s + 2


def test_nobody_waits_much_longer_than_computing_takes() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    scene.other.engine._tell_scheduler = lambda: None  # type: ignore[method-assign]  # what we say is not refined
    scene.other.engine.context.scheduler.predictor = Predictor(prefill=(0.0, 0.02, 0.0), decode=(0.0, 0.0, 0.0))
    receive = scene.holder.engine.receive
    scene.holder.engine.receive = lambda i, m: None if isinstance(m, FetchOrder | CancelOrder) else receive(i, m)  # type: ignore[method-assign]
    for number in range(3):
        scene.ask(f"silent{number}", PROMPT, Placement(None, scene.ids[1]))
        stamps = scene.requests(scene.other)[number].timeline.stamps
        scene.forget(scene.other)
        lasted_s = max(stamps.values()) - min(stamps.values())
        assert lasted_s < 2 * 28 * 0.02 + 1 if number == 0 else lasted_s < 1, (
            "a peer that let us wait is not asked at once"
        )
    assert scene.cluster.fetches.failures == {"transfer_timeout": 1}


def test_what_ends_while_prefill_fetches_holds_nothing() -> None:
    scene = Scene(Role.MIXED, Role.DECODE, Role.PREFILL)
    prefill = scene.cluster.nodes[scene.ids[2]].engine
    pool = prefill.context.scheduler.pool
    for number in range(3):
        scene.holder.engine.receive = lambda i, m: None  # type: ignore[method-assign]
        scene.front_end.policy = Fixed(Placement(scene.ids[2], scene.ids[1]))
        prompt = [*PROMPT, *range(50, 60), number]
        scene.cluster.submit(f"r{number}", prompt, 5, 0.0)
        while not prefill.grants.by_id:
            scene.cluster.run(scene.cluster.clock.now_s() + 0.001)
        assert prefill.prefill.num_active == 1 and prefill.outstanding_tokens() == len(prompt)
        assert pool.counts().held == 11
        if number == 0:  # its client leaves: decode cancels
            scene.cluster.abort("r0", 0.0)
        elif number == 1:
            prefill.peer_lost(scene.ids[0])  # the holder: this one is computed
        else:
            prefill.peer_lost(scene.ids[1])  # decode, or so it seems
        scene.cluster.run(scene.cluster.clock.now_s() + 60)
        client = scene.cluster.clients[f"r{number}"]
        assert client.was_aborted or client.tokens == expected_tokens(prompt, 5)
        assert not prefill.grants.by_id and not pool.counts().held and scene.cluster.is_quiet()
        prefill.context.scheduler.pool.forget_all()
        scene.forget(scene.other)
    assert scene.ordered(scene.ids[2])[:2] == [0, 0]


def test_prefill_fetches_nothing_where_the_room_is_for_others() -> None:
    scene = Scene(Role.MIXED, Role.DECODE, Role.PREFILL)
    pool = scene.cluster.nodes[scene.ids[2]].engine.context.scheduler.pool
    held = pool.allocate(24 - 10)  # 10 are needed
    scene.cluster.at(1.0, lambda: pool.release(held))
    scene.ask("long", [*PROMPT, *range(50, 60)], Placement(scene.ids[2], scene.ids[1]))
    assert scene.cluster.fetches.num_fetched == 0 and scene.ordered(scene.ids[2]) == [0]


def test_fetches_do_not_take_the_blocks_that_a_large_prompt_waits_for() -> None:
    scene = Scene(Role.MIXED, Role.DECODE, Role.PREFILL)
    prefill, receive = scene.cluster.nodes[scene.ids[2]].engine, scene.holder.engine.receive
    scene.holder.engine.receive = lambda i, m: scene.cluster.at(0.3, lambda: receive(i, m))  # type: ignore[method-assign]
    transfers = {"loopback": scene.other.engine.context.transfers["loopback"].descriptor()}

    def order(name: str, prompt: list[int], num_held: int) -> Order:
        prefill.context.scheduler.pool.forget_all()
        num_blocks = -(-len(prompt) // BLOCK_SIZE)
        held = (scene.holder.peer, num_held) if num_held else (None, 0)
        wire, block_ids = Request(name, prompt).to_wire(), tuple(range(num_blocks))
        prefill.receive(scene.ids[1], PrefillOrder(name, 5, wire, 0, block_ids, scene.ids[1], transfers, *held))
        return prefill.prefill.orders[name]

    assert order("first", [*PROMPT, 0, 0, 0], 28).state is OrderState.FETCHING
    large = order("large", [9] * 62, 0)  # 16 of 24 blocks
    for number in range(10):
        scene.cluster.run(scene.cluster.clock.now_s() + 0.1)
        order(f"later-{number}", [*PROMPT, number, 0, 0], 28)
    assert large.state is not OrderState.QUEUED


def test_attempts_that_fetch_do_not_take_the_blocks_that_a_large_prompt_waits_for() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    engine, receive = scene.other.engine, scene.holder.engine.receive
    scene.holder.engine.receive = lambda i, m: scene.cluster.at(0.3, lambda: receive(i, m))  # type: ignore[method-assign]

    def reserve(name: str, prompt: list[int], num_held: int) -> Served:
        engine.context.scheduler.pool.forget_all()
        held = (scene.holder.peer, num_held) if num_held else (None, 0)
        engine.receive("f", Reserve(Request(name, prompt, SamplingParams(max_tokens=2)).to_wire(), None, *held))
        return engine.decode.served[name, 1]

    assert reserve("first", [*PROMPT, 0, 0, 0], 28).state is ServedState.FETCHING
    large = reserve("large", [9] * 62, 0).request  # 16 of 24 blocks
    for number in range(20):
        scene.cluster.run(scene.cluster.clock.now_s() + 0.1)
        reserve(f"later-{number}", [*PROMPT, number, 0, 0], 28)
    assert large.phase is not Phase.RESERVED


def test_a_fetching_attempt_counts_with_what_is_left_of_it() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    engine, prompt = scene.other.engine, [*PROMPT, *range(50, 60)]
    scene.holder.engine.receive = lambda i, m: None  # type: ignore[method-assign]
    scene.front_end.policy = Fixed(Placement(None, scene.ids[1]))
    scene.cluster.submit("r", prompt, 5, 0.0)
    while not engine.grants.by_id:
        scene.cluster.run(scene.cluster.clock.now_s() + 0.001)
    assert engine.outstanding_tokens() == len(prompt)


def test_a_holder_that_says_nothing_is_not_waited_for() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    receive = scene.holder.engine.receive
    scene.holder.engine.receive = lambda i, m: None if isinstance(m, FetchOrder | CancelOrder) else receive(i, m)  # type: ignore[method-assign]
    started_s = scene.cluster.clock.now_s()
    scene.ask("again", PROMPT, Placement(None, scene.ids[1]))
    assert scene.cluster.fetches.failures == {"transfer_timeout": 1}
    stamps = scene.requests(scene.other)[0].timeline.stamps
    assert max(stamps.values()) - started_s < OPTIONS.fetch_s + 2


def test_a_holder_that_says_less_each_time_is_not_waited_for_each_time() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    receive, asked = scene.holder.engine.receive, []

    def answer(sender_id: str, message: Message) -> None:
        if not isinstance(message, FetchOrder):
            return receive(sender_id, message)
        if message.grant_id not in asked:
            asked.append(message.grant_id)
            less = OrderEnded(message.grant_id, "less is here", num_held_blocks=len(message.block_ids) - 1)
            scene.cluster.at(2.0, lambda: scene.other.engine.receive(scene.ids[0], less))
        return None

    scene.holder.engine.receive = answer  # type: ignore[method-assign]
    started_s = scene.cluster.clock.now_s()
    scene.ask("again", PROMPT, Placement(None, scene.ids[1]))
    assert (
        len(asked) > 1
        and max(scene.requests(scene.other)[0].timeline.stamps.values()) - started_s < OPTIONS.fetch_s + 2
    )


def test_what_computes_sooner_is_computed() -> None:
    scene = Scene(Role.MIXED, Role.MIXED)
    scheduler = scene.other.engine.context.scheduler
    scene.other.engine._tell_scheduler = lambda: None  # type: ignore[method-assign]  # what we say is not refined
    scheduler.predictor = Predictor(prefill=(0.0, 1e-6, 0.0), decode=(0.0, 0.0, 0.0))
    scene.ask("measured", PROMPT, Placement(None, scene.ids[1]))  # the link is not known yet
    assert scene.cluster.fetches.num_fetched == 1
    scene.forget(scene.other)
    scene.ask("known", PROMPT, Placement(None, scene.ids[1]))
    assert scene.cluster.fetches.num_fetched == 1
    scheduler.predictor = Predictor(prefill=(0.0, 1.0, 0.0), decode=(0.0, 0.0, 0.0))
    scene.forget(scene.other)
    scene.ask("slow", PROMPT, Placement(None, scene.ids[1]))
    assert scene.cluster.fetches.num_fetched == 2


def order_by_hand(scene: Scene, grant_id: str, **changes: object) -> FetchOrder:
    decode = scene.other.engine.context
    transfer = decode.transfers["loopback"]
    block_ids = tuple(decode.scheduler.pool.allocate(2))
    transfer.open_epoch(grant_id, block_ids, 5)
    hashes = tuple(scene.requests(scene.holder)[0].local.block_hashes[:2])
    order = FetchOrder(grant_id, 5, hashes, block_ids, scene.ids[1], {"loopback": transfer.descriptor()})
    return FetchOrder(**{**{n: getattr(order, n) for n in FetchOrder.__slots__}, **changes})


def said(scene: Scene, kind: type) -> list:
    sent = [a.message for a in scene.holder.engine.take_actions() if isinstance(a, Send)]
    return [m for m in sent if isinstance(m, kind)]


def test_an_order_is_executed_at_most_once_and_a_bad_one_never() -> None:
    scene = Scene(Role.DECODE, Role.DECODE)
    holder, other = scene.holder.engine, scene.ids[1]
    order = order_by_hand(scene, "g1")
    for _ in range(3):
        holder.receive(other, order)
    scene.cluster.network.run_until(scene.cluster.clock.now_s() + 1)
    holder.step()
    assert len(said(scene, HandOver)) == 1
    holder.receive(other, order)  # late: the same answer, no second write
    assert [m.chunk for m in said(scene, HandOver)] == [None]
    holder.receive(other, CancelOrder("g2"))
    holder.receive(other, order_by_hand(scene, "g2"))  # its cancellation came first
    assert [m.was_cancelled for m in said(scene, OrderEnded)] == [True, True]
    for number, changes in enumerate(
        ({"block_ids": (1,)}, {"block_hashes": ()}, {"block_hashes": (b"?", b"")}, {"transfers": {}})
    ):
        holder.receive(other, order_by_hand(scene, f"bad{number}", **changes))
        (ended,) = said(scene, OrderEnded)
        assert ended.num_held_blocks == 0 and ended.reason
    holder.is_draining = True
    holder.receive(other, order_by_hand(scene, "g3"))
    assert [m.reason for m in said(scene, OrderEnded)] == ["draining"]
    assert holder.context.scheduler.pool.counts().held == 0 and holder.prefill.num_active == 1


def test_a_hand_over_of_another_kind_ends_the_attempt_only() -> None:
    scene = Scene(Role.MIXED, Role.DECODE, Role.PREFILL)
    scene.front_end.policy = Fixed(Placement(scene.ids[2], scene.ids[1]))
    scene.cluster.submit("r", [9] * 20, 5, 0.0)
    grants = scene.other.engine.grants
    while not grants.by_id:
        scene.cluster.run(scene.cluster.clock.now_s() + 0.001)
    (grant_id,) = grants.by_id
    scene.other.engine.receive(scene.ids[2], HandOver(grant_id, None, (), 0, "loopback"))
    scene.cluster.run(scene.cluster.clock.now_s() + 60)
    assert scene.cluster.clients["r"].tokens == expected_tokens([9] * 20, 5) and scene.cluster.is_quiet()


def test_a_prefill_order_names_blocks_from_the_first_to_the_last() -> None:
    scene = Scene(Role.MIXED, Role.DECODE)
    holder, decode = scene.holder.engine, scene.other.engine.context
    wire, transfer = Request("r", PROMPT[:5], front_end_id="f").to_wire(), decode.transfers["loopback"]
    for number, (first_block, num_blocks) in enumerate([(-1, 3), (0, 1), (0, 3), (3, 0)]):
        block_ids = tuple(range(num_blocks))
        transfers = {"loopback": transfer.descriptor()}
        holder.receive(
            scene.ids[1], PrefillOrder(f"g{number}", 5, wire, first_block, block_ids, scene.ids[1], transfers)
        )
        (ended,) = said(scene, OrderEnded)
        assert f"{num_blocks} blocks from {first_block} on were ordered for 5 tokens" in ended.reason
    assert holder.context.scheduler.pool.counts().held == 0 and not holder.prefill.num_active
