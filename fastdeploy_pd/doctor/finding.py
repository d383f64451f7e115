"""What a check says, and how checks run: one after another, each within a deadline, none able to end the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STATES = ("ok", "warn", "fail", "absent")
REPORT = "fastdeploy-pd doctor --json > doctor.json, and report it"
MAX_TEXT = 2000  # characters of a field that comes from a peer


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    name: str
    state: str  #: "ok"; "warn": works, but badly; "fail": will not work; "absent": is not here, and nothing here asks for it
    detail: str
    remedy: str = ""  #: the command that mends it

    def line(self) -> str:
        """Returns: it as one line of printable text."""
        text = f"{self.name}: {self.detail}" + (f"; mend: {self.remedy}" if self.remedy else "")
        return f"{self.state:<6}  " + "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))

    def to_wire(self) -> dict[str, str]:
        """Returns: plain values."""
        return asdict(self)

    @classmethod
    def from_wire(cls, values: Mapping[str, Any]) -> Finding:
        """Raises: ValueError: it is none."""
        fields = [values.get(name) for name in ("name", "state", "detail", "remedy")]
        texts = [field[:MAX_TEXT] for field in fields if isinstance(field, str)]
        if len(texts) != len(fields) or texts[1] not in STATES:
            raise ValueError("the peer sent something that is no finding")
        return cls(*texts)


class NotTested(Exception):
    """A check cannot be made because an earlier one has failed."""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to find out."""

    name: str
    run: Callable[[], Iterable[Finding]]
    deadline_s: float = 5.0
    remedy: str = ""  #: if it does not end in time


def run_checks(checks: Sequence[Check], show: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """
    Args:
        show: told each finding as soon as its check has ended.
    Returns: what the checks found, in order. One that fails or does not end has found just that.
    """
    found: list[Finding] = []
    for check in checks:
        for finding in _run(check):
            found.append(finding)
            show(finding)
    return found


def _run(check: Check) -> list[Finding]:
    found: list[Finding] = []
    is_over = threading.Event()

    def work() -> None:
        try:
            found.extend(check.run())
        except NotTested as error:
            found.append(Finding(check.name, "absent", f"not tested: {error}"))
        except Exception as error:  # noqa: BLE001  # whatever a driver or a library raises is that check's finding
            found.append(Finding(check.name, "fail", f"{type(error).__name__}: {error}", check.remedy or REPORT))
        finally:
            is_over.set()

    # A daemon: one that hangs in a driver does not keep the process from ending.
    threading.Thread(target=work, name=f"doctor-{check.name}", daemon=True).start()
    if is_over.wait(check.deadline_s):
        return found
    return [*found, Finding(check.name, "fail", f"no answer within {check.deadline_s:g} s", check.remedy or REPORT)]


def size(num_bytes: float) -> str:
    """Returns: e.g. "23.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"
