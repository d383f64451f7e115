"""Starts the thread that tells the front ends what this engine's prefix cache holds."""

from __future__ import annotations

from fastdeploy_pd.cluster.prefixes import PrefixPublisher, Repeater
from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.core.prefix_index import HeldBlocks
from fastdeploy_pd.engine.build import BuiltEngine, redis_options


def start_publisher(config: InstanceConfig, built: BuiltEngine) -> Repeater:
    """Returns: the thread; it does not run where nobody else would read it, or nothing is cached."""
    held = HeldBlocks()
    publisher = PrefixPublisher(redis_options(config.cluster), built.instance_id, held)
    thread = Repeater("prefix-publisher", publisher.publish, publisher.close)
    if config.cluster.scheduler_name != "local" and config.cache.enable_prefix_caching:
        built.engine.context.scheduler.pool.listener = held
        thread.start()
    return thread
