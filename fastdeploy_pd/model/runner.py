"""Turns a `Batch` into tensors, runs the decoder, samples. The only builder of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdeploy_pd.core.batch import Batch, ScheduledSequence
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.checkpoint import Checkpoint, ModelConfig
from fastdeploy_pd.model.decoder import Decoder
from fastdeploy_pd.model.ops.base import AttentionPlan, Ops, PromptSpan
from fastdeploy_pd.model.sampler import sample, token_logprobs
from fastdeploy_pd.request import TokenLogprobs

OPS_NAMES = ("paddle", "torch", "reference")


@dataclass(slots=True)
class StepOutput:
    """What a step yields for one sequence."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


def make_ops(name: str, dtype: str = "float32", num_threads: int | None = None) -> Ops:
    """Returns: a backend by name. Raises: ConfigError: unknown, not installed, or not for this dtype."""
    if name not in OPS_NAMES:
        raise ConfigError(f"--ops is {name!r}; it must be one of {', '.join(OPS_NAMES)}")
    if dtype != "float32" and name != "torch":
        raise ConfigError(f"--dtype {dtype} needs --ops torch: on CPU {name} computes in float32")
    try:
        if name == "paddle":
            from fastdeploy_pd.model.ops.paddle import PaddleOps

            return PaddleOps(num_threads)
        if name == "torch":
            from fastdeploy_pd.model.ops.torch import TorchOps

            return TorchOps(dtype, num_threads)
    except ImportError as error:
        raise ConfigError(
            f"--ops {name} needs a package that is not installed: {error}; pip install '.[{name}]'"
        ) from error
    from fastdeploy_pd.model.ops.reference import ReferenceOps

    return ReferenceOps()


class ModelRunner:
    """A model over one KV pool."""

    def __init__(
        self,
        directory: Path,
        ops_name: str,
        pool: np.ndarray,
        layout: KVLayout,
        dtype: str = "float32",
        num_threads: int | None = None,
    ) -> None:
        """
        Args:
            pool: [layout.pool_bytes] uint8, shared with the transfer; K and V are written into it in place.
            dtype: compute type of weights and activations.
            num_threads: threads of a product; the backend's default when None.
        Raises: ModelLoadError, ConfigError.
        """
        self.config = ModelConfig.from_directory(directory)
        self.layout = layout
        ops = make_ops(ops_name, dtype, num_threads)
        self.decoder = Decoder(self.config, Checkpoint(directory), ops)
        self._caches = ops.cache(pool, layout)

    @staticmethod
    def kv_layout(config: ModelConfig, num_blocks: int, block_size: int, dtype: str) -> KVLayout:
        """Returns: the pool's layout for a model."""
        return KVLayout(config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim, dtype)

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> list[StepOutput]:
        """Compute a batch.

        Args:
            on_layer: called with each layer's index as soon as its K and V are in the pool.
        Returns: one output a sequence, in the batch's order.
        """
        token_ids = np.array([t for s in batch.sequences for t in s.token_ids], dtype=np.int64)
        rows = self._logit_rows(batch)
        flat_rows = np.array([r for wanted in rows for r in wanted], dtype=np.int64)
        logits = self.decoder.forward(token_ids, self._plan(batch), self._caches, flat_rows, on_layer)
        outputs, first = [], 0
        for sequence, wanted in zip(batch.sequences, rows, strict=True):
            outputs.append(self._output(sequence, logits[first : first + len(wanted)]))
            first += len(wanted)
        return outputs

    def _plan(self, batch: Batch) -> AttentionPlan:
        """Slots, positions, and which sequences are attended to one by one or all together."""
        block_size = self.layout.block_size
        positions = np.concatenate([np.arange(s.start, s.stop, dtype=np.int64) for s in batch.sequences])
        tables = [np.array(s.request.local.block_table, dtype=np.int64) for s in batch.sequences]
        block_ids = np.concatenate(
            [t[np.arange(s.start, s.stop) // block_size] for s, t in zip(batch.sequences, tables, strict=True)]
        )
        spans, singles, row = [], [], 0
        for sequence, table in zip(batch.sequences, tables, strict=True):
            num_blocks = -(-sequence.stop // block_size)
            if sequence.num_tokens == 1:
                singles.append((row, table[:num_blocks], sequence.stop))
            else:
                spans.append(PromptSpan(row, sequence.num_tokens, sequence.start, table[:num_blocks]))
            row += sequence.num_tokens
        padded = np.zeros((len(singles), max((len(t) for _, t, _ in singles), default=0)), np.int64)
        for index, (_, table, _) in enumerate(singles):
            padded[index, : len(table)] = table
        return AttentionPlan(
            block_ids,
            positions % block_size,
            positions,
            spans,
            np.array([r for r, _, _ in singles], np.int64),
            padded,
            np.array([n for _, _, n in singles], np.int64),
        )

    def _logit_rows(self, batch: Batch) -> list[list[int]]:
        """Rows whose logits are needed: the last where a token is sampled, those before prompt tokens where asked for."""
        rows, first = [], 0
        for sequence in batch.sequences:
            wanted = []
            if sequence.request.sampling.prompt_logprobs is not None:
                wanted = [first + p - 1 - sequence.start for p in self._scored_positions(sequence)]
            if sequence.needs_sample:
                wanted.append(first + sequence.num_tokens - 1)
            rows.append(wanted)
            first += sequence.num_tokens
        return rows

    def _scored_positions(self, sequence: ScheduledSequence) -> range:
        """Prompt positions whose log-probability this step's logits give: (start, stop], within the prompt."""
        return range(sequence.start + 1, min(sequence.stop, len(sequence.request.prompt_token_ids) - 1) + 1)

    def _output(self, sequence: ScheduledSequence, logits: np.ndarray) -> StepOutput:
        request, sampling = sequence.request, sequence.request.sampling
        output = StepOutput()
        if sampling.prompt_logprobs is not None:
            scored: list[TokenLogprobs | None] = [None] if sequence.start == 0 else []
            for row, position in enumerate(self._scored_positions(sequence)):
                scored.append(token_logprobs(logits[row], request.prompt_token_ids[position], sampling.prompt_logprobs))
            output.prompt_logprobs = tuple(scored)
        if sequence.needs_sample:
            output.token_id = sample(logits[-1], request)
            if sampling.logprobs is not None:
                output.logprobs = token_logprobs(logits[-1], output.token_id, sampling.logprobs)
        return output
