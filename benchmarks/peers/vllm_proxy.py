"""A proxy before vLLM's prefill and decode servers: one completion is a request to each, as NixlConnector's users do it.

    python -m benchmarks.peers.vllm_proxy --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

The prefill server is asked for one token with `do_remote_decode` and answers with the `kv_transfer_params` under which its KV blocks
can be read; the decode server gets the client's request with them. What it answers is passed on as it comes, unread: the proxy
costs a token one read and one write. Source: vLLM's documentation of NixlConnector and of its disaggregated proxies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid
from typing import Any

import uvloop

from benchmarks.client import READ_BYTES, post

NOWHERE = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False, **NOWHERE}
NOT_FOR_PREFILL = ("stream_options", "min_tokens")


class Proxy:
    """Two servers' front."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill, self._decode = prefill, decode

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection: one request, or /health."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.decode().split(" ", 2)
            if method == "GET":
                writer.write(_answer(200, b"{}"))
            else:
                body = json.loads(await reader.readexactly(_length(head)))
                await self._pass_on(path, body, writer)
            await writer.drain()
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            writer.write(_answer(502, json.dumps({"error": {"message": str(error)}}).encode()))
        finally:
            writer.close()

    async def _pass_on(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        headers = {"X-Request-Id": uuid.uuid4().hex}
        ask = {name: value for name, value in body.items() if name not in NOT_FOR_PREFILL}
        ask |= {"stream": False, "max_tokens": 1, "kv_transfer_params": REMOTE_DECODE}
        reader, prefill = await post(self._prefill, path, json.dumps(ask).encode(), headers)
        head, _, data = (await reader.read()).partition(b"\r\n\r\n")
        prefill.close()
        if head.split(b" ", 2)[1:2] != [b"200"]:
            writer.write(head + b"\r\n\r\n" + data)
            return
        if params := json.loads(data).get("kv_transfer_params"):  # none for a prompt too short to have a whole block
            body["kv_transfer_params"] = params
        reader, decode = await post(self._decode, path, json.dumps(body).encode(), headers)
        try:
            while piece := await reader.read(READ_BYTES):
                writer.write(piece)
                await writer.drain()
        finally:
            decode.close()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError("a request needs Content-Length")


def _answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d -\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body)


async def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, help="URL of the prefill server")
    parser.add_argument("--decode", required=True, help="URL of the decode server")
    args = parser.parse_args()
    server = await asyncio.start_server(Proxy(args.prefill, args.decode).serve, args.host, args.port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
