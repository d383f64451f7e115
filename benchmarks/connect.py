"""How long two processes that never spoke take from the first call to the first block: connection, handshake, block, report."""

from __future__ import annotations

from benchmarks.job import NUM_LAYERS, Job
from benchmarks.pair import Pair
from benchmarks.peers import PEERS

BLOCK_BYTES = 4096


def connect_times(name: str, count: int) -> list[float]:
    """Returns: [count] seconds until the target has reported a block a layer, each from a source that is new."""
    pool_bytes = 4 * NUM_LAYERS * BLOCK_BYTES
    pair, peer, times_s = Pair(name, pool_bytes, BLOCK_BYTES), PEERS[name], []
    module = peer.load()
    for seed in range(count):
        pair.source.close()
        pair.source = module.Source(pool_bytes, BLOCK_BYTES, peer.option, pair.facts)
        job = Job(pool_bytes, BLOCK_BYTES, True, seed)
        times_s.append(pair.move(job)[1])
    pair.close()
    return times_s
