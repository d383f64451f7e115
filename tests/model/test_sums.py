"""Sums of ranks on GPUs: by one launch, and by NCCL where they are large."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.transfer.gpu import num_gpus

pytestmark = pytest.mark.skipif(num_gpus() < 2, reason="fewer than two GPUs here")
HIDDEN = 4096
ROWS = (1, 9, 64, 400, 1024, 2048, 2049)  # the last one is NCCL's
ROUNDS = 20


def rank(path: Path, index: int, dtype: str, pipe: Any) -> None:
    """Send whether small sums are formed without NCCL, and the largest relative error."""
    import torch

    from fastdeploy_pd.model.ops.cuda import CudaOps

    torch.cuda.set_device(index)
    ops = CudaOps(dtype, 1, "cuda")
    ops.join(path, index, 2)
    worst = 0.0
    for number, rows in enumerate(ROWS * ROUNDS):
        seed = torch.Generator(ops.device).manual_seed(number)
        parts = [torch.randn(rows, 128, generator=seed, device=ops.device).to(ops.dtype) for _ in range(2)]
        weight = torch.randn(HIDDEN, 128, generator=seed, device=ops.device).to(ops.dtype)
        residual = torch.randn(rows, HIDDEN, generator=seed, device=ops.device).to(ops.dtype)
        wanted = residual.double() + sum(part.double() @ weight.double().t() for part in parts)
        total = ops.all_reduce(ops.linear_add(parts[index], weight, None, residual.clone() if index == 0 else None))
        # and on with what came of it
        wanted += parts[0].double() @ weight.double().t()
        total = ops.all_reduce(ops.linear_add(parts[0] * (index == 0), weight, None, total if index == 0 else None))
        worst = max(worst, ((total.double() - wanted).norm() / wanted.norm()).item())
    pipe.send((ops._small_sums is not None, worst))
    pipe.recv()


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_sums_are_right_whatever_their_size(tmp_path: Path, dtype: str, most: float) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = []
    ranks = []
    for index in range(2):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        ranks.append(context.Process(target=rank, args=(tmp_path / "group", index, dtype, theirs), daemon=True))
        ranks[-1].start()
    try:
        for pipe in pipes:
            assert pipe.poll(120)
            is_able, worst = pipe.recv()
            assert is_able
            assert worst < most
        for pipe in pipes:
            pipe.send(None)
        for process in ranks:
            process.join(30)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
