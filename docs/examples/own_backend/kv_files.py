"""A transfer backend of one's own: KV blocks through files in a directory that both machines mount.

Handshake, frames, epochs, refusals and the death of peers are TcpTransfer's; here stands how the bytes travel: the sender writes a
frame's blocks into a file and announces it, the receiver reads the file, copies it into its pool and removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError, TransferUnavailable
from fastdeploy_pd.transfer.epochs import Incoming
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.layout import KVPool, rows_of, unpack_ids
from fastdeploy_pd.transfer.stream import StreamTransfer
from fastdeploy_pd.transfer.tcp import TcpTransfer


class FilesTransfer(TcpTransfer):
    """See fastdeploy_pd/transfer/base.py for the contract and stream.py for the methods that a backend defines."""

    name = "files"
    acknowledges = True  # EpochSent says that the receiver has the bytes, not that a file was written

    def __init__(
        self,
        pool: KVPool,
        layout: KVLayout,
        fingerprint: str,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: bytes | None = None,
    ) -> None:
        """Every backend is built with these arguments. Raises: TransferUnavailable: KV_FILES_DIR names no directory."""
        self._directory = Path(os.environ.get("KV_FILES_DIR", ""))
        if not os.environ.get("KV_FILES_DIR") or not self._directory.is_dir():
            raise TransferUnavailable(
                f"KV_FILES_DIR={os.environ.get('KV_FILES_DIR')!r} is no directory; mount one for it"
            )
        super().__init__(pool, layout, fingerprint, host, port, secret)

    def address(self) -> dict[str, Any]:
        """What peers are told, besides the TCP address: which directory this is, by a name that lies in it."""
        mark = self._directory / "directory-id"
        with contextlib.suppress(FileExistsError), open(mark, "x") as new:
            new.write(secrets.token_hex(16))
        return {**super().address(), "directory": mark.read_text()}

    def reaches(self, peer: dict[str, Any]) -> str:
        """ "" if the peer mounts the same directory and its cache fits, else why not."""
        if (own := self.address()["directory"]) != peer.get("directory"):
            return f"directory: {own} != {peer.get('directory')}"
        return super().reaches(peer)

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """The file first, then the frame that announces it. While `reading`, the blocks stay as they are."""
        with self.reading(frame.epoch) as outgoing:
            if outgoing is None:
                return False
            rows = rows_of(frame.layers, unpack_ids(frame.local), outgoing.layout.num_blocks)
            blocks = self._pool.array.reshape(-1, frame.block_bytes)[rows]
        with open(self._path(frame), "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(blocks)
        return StreamTransfer.send_write(self, connection, frame, last)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """Wait for the file system outside of `landing`, and copy inside: a revocation waits for no longer than that."""
        rows = rows_of(frame.layers, unpack_ids(frame.remote), incoming.layout.num_blocks)
        blocks = np.fromfile(self._path(frame), np.uint8)
        self.skip(connection, frame)
        if len(blocks) != frame.num_bytes:
            raise TransferError(f"a file of {len(blocks)} bytes for {len(rows)} blocks")
        with incoming.landing() as is_open:
            if is_open:
                self._pool.array.reshape(-1, frame.block_bytes)[rows] = blocks.reshape(len(rows), -1)

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """A refused write: its file goes."""
        self._path(frame).unlink(missing_ok=True)

    def _path(self, frame: WriteFrame) -> Path:
        """Both ends know it, as every (epoch, layer, block) is written once."""
        return self._directory / hashlib.blake2b(msgspec.msgpack.encode(frame), digest_size=16).hexdigest()
