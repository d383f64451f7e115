"""Which few of many instances a placement looks at, so that it costs the same with ten as with ten thousand.

Of each kind (prefill, decode, mixed) those that hold the request's longest known prefix, the least loaded and some at random: a policy chooses
well among the best few, a stale or wrong view of one does no lasting harm, and nobody is forgotten. Up to MOST of a kind all of them are looked at.
Source: a few choices at random do almost as well as all of them (Mitzenmacher, IEEE TPDS 2001); the best known ones are added.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence

MOST = 16  # of a kind
NUM_HOLDERS = 4
NUM_LEAST = 8
NUM_RANDOM = MOST - NUM_HOLDERS - NUM_LEAST
MAX_PREFIXES = 1_000_000  # remembered, about 200 bytes each


class Shortlist:
    """Instances by kind and load; changing one costs the logarithm of their number, choosing about as much."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._kind_of: dict[str, _Kind] = {}

    def __len__(self) -> int:
        return len(self._kind_of)

    def put(self, instance_id: str, kind: Hashable, num_tokens: int) -> None:
        """Add an instance, or say what its load, or its kind, is now."""
        group = self._kind_of.get(instance_id)
        if group is None or self._kinds.get(kind) is not group:
            self.remove(instance_id)
            group = self._kind_of[instance_id] = self._kinds.setdefault(kind, _Kind())
        group.put(instance_id, num_tokens)

    def remove(self, instance_id: str) -> None:
        """Forget an instance. Does nothing if it is not there."""
        group = self._kind_of.pop(instance_id, None)
        if group is not None:
            group.remove(instance_id)

    def choose(self, holders: Collection[str], rng: random.Random) -> list[str]:
        """Returns: at most MOST ids of each kind, each once.

        Args:
            holders: who is known to hold the request's longest prefix; the first NUM_HOLDERS of a kind are taken.
        """
        found: list[str] = []
        for group in self._kinds.values():
            group.choose([h for h in holders if self._kind_of.get(h) is group], rng, found)
        return found


class _Kind:
    """The instances of one kind."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._places: dict[str, int] = {}  # in _ids
        self._entries: dict[str, tuple[int, int, str]] = {}  # (tokens, number of the change, id), the newest
        self._heap: list[tuple[int, int, str]] = []  # these, and older ones that count no more
        self._num_changes = 0  # of equals the one that changed longest ago comes first

    def put(self, instance_id: str, num_tokens: int) -> None:
        """See `Shortlist.put`."""
        known = self._entries.get(instance_id)
        if known is None:
            self._places[instance_id] = len(self._ids)
            self._ids.append(instance_id)
        elif known[0] == num_tokens:
            return
        self._num_changes += 1
        entry = self._entries[instance_id] = num_tokens, self._num_changes, instance_id
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 4 * len(self._ids) + MOST:
            self._heap = sorted(self._entries.values())

    def remove(self, instance_id: str) -> None:
        """See `Shortlist.remove`."""
        del self._entries[instance_id]
        place, last = self._places.pop(instance_id), self._ids.pop()
        if last != instance_id:
            self._ids[place], self._places[last] = last, place

    def choose(self, holders: Sequence[str], rng: random.Random, found: list[str]) -> None:
        """Append this kind's part to `found`; see `Shortlist.choose`."""
        if len(self._ids) <= MOST:
            found += self._ids
            return
        chosen = dict.fromkeys(holders[:NUM_HOLDERS])
        chosen.update(dict.fromkeys(self._least(NUM_LEAST)))
        for _ in range(NUM_RANDOM):
            chosen[self._ids[rng.randrange(len(self._ids))]] = None
        found += chosen

    def _least(self, count: int) -> list[str]:
        taken: list[tuple[int, int, str]] = []
        while len(taken) < count:
            entry = heapq.heappop(self._heap)
            if self._entries.get(entry[2]) is entry:
                taken.append(entry)
        for entry in taken:
            heapq.heappush(self._heap, entry)
        return [instance_id for _, _, instance_id in taken]


class RecentPlacements:
    """Who was last given a request with a prefix: a hint of who holds its blocks, which costs no message and may be stale."""

    def __init__(self, stride: int, max_prefixes: int = MAX_PREFIXES) -> None:
        """
        Args:
            stride: every so many blocks a prefix is remembered.
        """
        self._stride, self._max_prefixes = stride, max_prefixes
        self._holders: OrderedDict[Hashable, tuple[str, ...]] = OrderedDict()  # newest last

    def note(self, block_hashes: Sequence[Hashable], instance_id: str) -> None:
        """A request with these blocks has been placed."""
        known, alone = self._holders, (instance_id,)
        # The longest first: a prefix outlives its continuations.
        for block_hash in reversed(block_hashes[self._stride - 1 :: self._stride]):
            before = known.get(block_hash)
            if before is None:
                known[block_hash] = alone
                continue
            known.move_to_end(block_hash)
            if before[0] != instance_id:
                known[block_hash] = (instance_id, *[i for i in before if i != instance_id][: NUM_HOLDERS - 1])
        while len(known) > self._max_prefixes:
            known.popitem(last=False)

    def holders(self, block_hashes: Sequence[Hashable]) -> tuple[str, ...]:
        """Returns: at most NUM_HOLDERS ids, the newest first, for the longest prefix that is remembered."""
        for block_hash in reversed(block_hashes[self._stride - 1 :: self._stride]):
            found = self._holders.get(block_hash)
            if found is not None:
                return found
        return ()
