"""What a topic lacks is said: in the log, once, in /health, and to requests that find nobody; over real links."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.links import AsyncLinks, Links
from fastdeploy_pd.cluster.messages import Beat, Peer
from fastdeploy_pd.engine import client as client_module
from fastdeploy_pd.engine.client import ClusterClient
from fastdeploy_pd.engine.client_api import HealthReport
from fastdeploy_pd.engine.frontend import FrontEnd, FrontEndOptions, Instance
from fastdeploy_pd.errors import NoCapacity
from fastdeploy_pd.request import Request

SECRET, OTHER = b"a cluster secret of many bytes", b"another secret of many bytes"
OPTIONS = FrontEndOptions(beat_s=0.05, placement_timeout_s=0.3)


def seen(
    roles: Sequence[str], secrets: Sequence[bytes], monkeypatch: pytest.MonkeyPatch
) -> tuple[HealthReport, str | None]:
    """What /health says of engines that answer beats after a second, and why a request failed that came then."""
    monkeypatch.setattr(client_module, "LACK_S", 0.3)

    async def run() -> tuple[HealthReport, str | None]:
        links = AsyncLinks("front", secret=SECRET)
        client = ClusterClient(FrontEnd("front", random.Random(0), OPTIONS), links, WallClock())
        client.topic = "dmeo"
        engines = [
            Links(f"{role}-1", ["tcp://127.0.0.1:*"], secret) for role, secret in zip(roles, secrets, strict=True)
        ]
        await client.start()
        client.set_members(
            [
                Instance(Peer(e.own_id, e.addresses[0]), role != "decode", role != "prefill")
                for e, role in zip(engines, roles, strict=True)
            ]
        )
        for number in range(100):
            for engine in engines:
                for sender, item in engine.receive():
                    if isinstance(item, Beat):
                        engine.send(sender, Beat(number))
            await asyncio.sleep(0.01)
        report, error = await client.health(), None
        if not report.is_ready:
            try:
                _ = [c async for c in client.generate(Request("r", [1, 2]))]
            except NoCapacity as raised:
                error = raised.message
        await client.stop()
        for opened in (links, *engines):
            opened.close()
        return report, error

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("role", "is_ready", "missing"),
    [("decode", True, "no prefill or mixed instance"), ("prefill", False, "no decode or mixed instance")],
)
def test_an_instance_alone_in_its_topic(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, role: str, is_ready: bool, missing: str
) -> None:
    report, error = seen([role], [SECRET], monkeypatch)
    assert report.is_ready == is_ready and missing in str(report.detail["missing"])
    assert is_ready or missing in str(error)
    (said,) = [r.getMessage() for r in caplog.records if "topic 'dmeo'" in r.getMessage()]
    assert said.startswith(f"topic 'dmeo': there is {missing}")


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for roles in (["mixed"], ["prefill", "decode"]):
        report, _ = seen(roles, [SECRET] * len(roles), monkeypatch)
        assert report.is_ready and "missing" not in report.detail
    assert "topic" not in caplog.text


def test_another_secret(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    report, error = seen(["prefill", "decode"], [SECRET, OTHER], monkeypatch)
    for text in (str(report.detail["missing"]), str(error)):
        assert "no decode or mixed instance" in text
        assert "decode-1 is there, but it ended the link before it was established: its cluster secret differs" in text
    assert "has ended" not in caplog.text, "it is called again and again"
    assert caplog.text.count("Is the cluster secret the same on both sides") == 1
