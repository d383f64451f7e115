"""The example of docs/transfer_backends.md is installed as a package of its own and found by its entry point.

It passes the contract suite as the backend `files` of test_contract.py; here stands what only it has.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError, TransferUnavailable
from fastdeploy_pd.transfer.base import EpochArrived
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import GROUP, build
from tests.transfer.test_attacks import until
from tests.transfer.test_ipc import events

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "own_backend"
LAYOUT = KVLayout(num_layers=2, num_blocks=8, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")


def test_it_is_found_by_its_entry_point_and_leaves_no_files(installed_example: Path) -> None:
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    pools[0].array[:] = 7
    ends = [build("files", pool=pool, layout=LAYOUT, fingerprint="m") for pool in pools]
    ends[1].open_epoch("e", [1, 2], 5)
    for epoch in ("e", "refused"):
        ends[0].start(epoch, 5, ends[1].descriptor(), [1, 2])
        for layer in range(2):
            ends[0].write(epoch, [layer], [3, 4], [1, 2])
        ends[0].finish(epoch)
        events(ends[0])
    assert isinstance(events(ends[1])[0], EpochArrived)
    assert pools[1].block(1, 2) == pools[0].block(1, 4)
    # a refusal may arrive while the receiver has later frames, each with a file, still before it
    until(lambda: [p.name for p in installed_example.iterdir()] == ["directory-id"])
    assert "directory" in ends[0].reaches({**ends[1].descriptor(), "directory": "another"})
    for end in ends:
        end.close()


def test_without_its_directory_it_says_so(installed_example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KV_FILES_DIR")
    with pytest.raises(TransferUnavailable, match="KV_FILES_DIR"):
        build("files", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m")


@pytest.mark.skipif("files" in entry_points(group=GROUP).names, reason="somebody has installed it for good")
def test_uninstalled_it_is_unknown_and_installed_it_is_listed(installed_example: Path, built_example: Path) -> None:
    with pytest.raises(ConfigError, match="there are files, ipc, mooncake, nccl, rdma, shm, tcp"):
        build("file")
    sys.path.remove(str(built_example))
    with pytest.raises(ConfigError, match="there are ipc, mooncake, nccl, rdma, shm, tcp"):
        build("files")


def test_the_document_shows_it_as_it_is() -> None:
    text = (ROOT / "docs" / "transfer_backends.md").read_text()
    for name in ("kv_files.py", "pyproject.toml"):
        assert f"\n{(EXAMPLE / name).read_text()}```\n" in text, name
