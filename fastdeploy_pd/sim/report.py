"""What a simulated run says: attainment of the SLO, goodput, latencies, how busy everybody was; the same records, the same bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeploy_pd.sim.cluster import Record
from fastdeploy_pd.sim.instance import Instance
from fastdeploy_pd.sim.latency import Latency
from fastdeploy_pd.sim.trace import Offered

PERCENTILES = (50, 90, 99)
MOST_LINES = 64  # of instances, for a person


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must meet to count."""

    ttft_x: float = 5.0  #: most time to first token, in units of the prompt's prefill in an empty cluster
    tpot_ms: float = 100.0  #: most mean time per output token after the first


def tpot_s(offered: Offered, first_token_s: float, last_token_s: float) -> float | None:
    """Returns: mean seconds of a token after the first; None for a request of one token, which has none."""
    return (last_token_s - first_token_s) / (offered.num_output - 1) if offered.num_output > 1 else None


def row(record: Record, latency: Latency, slo: Slo) -> dict[str, Any]:
    """Returns: one request's line of the report; times in seconds but for tpot_ms, None where it never came so far, or has no such time."""
    offered = record.offered
    ttft_s = tpot_ms = queue_s = None
    meets_ttft = meets_tpot = False
    if (
        not record.is_failed
        and record.first_token_s is not None
        and record.started_s is not None
        and record.end_s is not None
    ):
        ttft_s = record.first_token_s - offered.arrival_s
        queue_s = record.started_s - offered.arrival_s
        seconds = tpot_s(offered, record.first_token_s, record.end_s)
        tpot_ms = None if seconds is None else seconds * 1e3
        judged_ms = (
            (record.end_s - record.first_token_s) * 1e3 if tpot_ms is None else tpot_ms
        )  # one token: its hand-over
        meets_ttft = ttft_s <= slo.ttft_x * latency.alone_s(offered.num_input)
        meets_tpot = judged_ms <= slo.tpot_ms
    return {
        "number": offered.number,
        "arrival_s": offered.arrival_s,
        "input_tokens": offered.num_input,
        "output_tokens": offered.num_output,
        "status": "refused" if record.is_refused else "failed" if record.is_failed else "finished",
        "prefill_id": record.prefill_id,
        "decode_id": record.decode_id,
        "cached_tokens": record.num_cached,
        "preemptions": record.num_preemptions,
        "queue_s": queue_s,
        "ttft_s": ttft_s,
        "tpot_ms": tpot_ms,
        "e2e_s": None
        if record.is_refused or record.is_failed or record.end_s is None
        else record.end_s - offered.arrival_s,
        "meets_ttft": meets_ttft,
        "meets_tpot": meets_tpot,
    }


def report(
    records: Sequence[Record], instances: Sequence[Instance], latency: Latency, slo: Slo, has_rows: bool = True
) -> dict[str, Any]:
    """Returns: the whole report, shares being of all offered requests; `requests` only with has_rows, they may be millions."""
    rows: list[dict[str, Any]] = []
    values = {name: array("d") for name in ("queue_s", "ttft_s", "tpot_ms", "e2e_s")}
    num_finished = num_refused = num_met_ttft = num_met_tpot = num_met = 0
    for record in records:
        found = row(record, latency, slo)
        num_finished += found["status"] == "finished"
        num_refused += record.is_refused
        num_met_ttft += found["meets_ttft"]
        num_met_tpot += found["meets_tpot"]
        num_met += found["meets_ttft"] and found["meets_tpot"]
        for name, column in values.items():
            if found[name] is not None:
                column.append(found[name])
        if has_rows:
            rows.append(found)
    refused = [r.offered.num_input for r in records if r.is_refused]
    span_s = max(r.end_s or 0.0 for r in records) - records[0].offered.arrival_s
    arrivals_s = records[-1].offered.arrival_s - records[0].offered.arrival_s
    return {
        "offered": len(records),
        "finished": num_finished,
        "refused": num_refused,
        **({"refused_because": _why_refused(refused, instances)} if refused and instances else {}),
        "rate": (len(records) - 1) / arrivals_s if arrivals_s else None,
        "span_s": span_s,
        "slo_attainment": num_met / len(records),
        "ttft_attainment": num_met_ttft / len(records),
        "tpot_attainment": num_met_tpot / len(records),
        "goodput": num_met / span_s if span_s else None,
        **{name: summary(column) for name, column in values.items()},
        "instances": [_instance(i, span_s) for i in instances],
        **({"requests": rows} if has_rows else {}),
    }


def _why_refused(lengths: Sequence[int], instances: Sequence[Instance]) -> str:
    pool = instances[0].scheduler.pool
    return (
        f"a prompt must be shorter than the {pool.num_blocks * pool.block_size} tokens that --num-blocks {pool.num_blocks} of --block-size "
        f"{pool.block_size} hold; the refused have {min(lengths)} to {max(lengths)}"
    )


def summary(values: Iterable[float | None]) -> dict[str, float | None]:
    """Returns: mean and percentiles (linear between neighbours) of what there is."""
    there = sorted(v for v in values if v is not None)
    names = [f"p{p}" for p in PERCENTILES]
    if not there:
        return dict.fromkeys(["mean", *names])
    found: dict[str, float | None] = {"mean": sum(there) / len(there)}
    for name, percent in zip(names, PERCENTILES, strict=True):
        place = (len(there) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(there) - 1)
        found[name] = there[low] + (there[high] - there[low]) * (place - low)
    return found


def _instance(instance: Instance, span_s: float) -> dict[str, Any]:
    scheduler = instance.scheduler
    queries = scheduler.num_prefix_queries
    return {
        "id": instance.instance_id,
        "busy": instance.busy_s / span_s if span_s else None,
        "steps": instance.num_steps,
        "tokens": instance.num_computed_tokens,
        "prefix_hits": scheduler.num_prefix_hits / queries if queries else None,
        "preemptions": scheduler.num_preemptions,
        "max_held_share": instance.max_held_blocks / scheduler.pool.num_blocks,
    }


def rates_table(runs: Iterable[dict[str, Any]]) -> str:
    """Returns: a line a run, for a person."""
    lines = ["requests/s  attainment      TTFT      TPOT   goodput  queue p90 s  TTFT p90 s  TPOT p90 ms"]
    for r in runs:
        shares = "".join(f"{100 * r[k]:>8.1f} %" for k in ("ttft_attainment", "tpot_attainment"))
        p90s = [r[k]["p90"] for k in ("queue_s", "ttft_s", "tpot_ms")]
        tails = "".join(f"{'-' if v is None else f'{v:.2f}':>{w}}" for v, w in zip(p90s, (13, 12, 13), strict=True))
        lines.append(
            f"{r['rate'] or 0:>10.2f}{100 * r['slo_attainment']:>10.1f} %{shares}{r['goodput'] or 0:>10.2f}{tails}"
        )
    return "\n".join(lines)


def table(found: dict[str, Any]) -> str:
    """Returns: the report for a person."""

    def text(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = [
        f"offered {found['offered']}, finished {found['finished']}, refused {found['refused']} "
        f"in {text(found['span_s'], 1)} s at {text(found['rate'])} requests/s",
        *([f"refused: {found['refused_because']}"] if "refused_because" in found else []),
        f"SLO attainment {share(found['slo_attainment'])} (TTFT {share(found['ttft_attainment'])}, "
        f"TPOT {share(found['tpot_attainment'])}), goodput {text(found['goodput'])} requests/s",
        "",
        f"{'':10}{'mean':>10}" + "".join(f"{f'p{p}':>10}" for p in PERCENTILES),
    ]
    for name in ("queue_s", "ttft_s", "tpot_ms", "e2e_s"):
        lines.append(f"{name:10}" + "".join(f"{text(v):>10}" for v in found[name].values()))
    lines += ["", "instance      busy    steps      tokens  prefix hits  preemptions  blocks held"]
    for i in found["instances"][:MOST_LINES]:
        lines.append(
            f"{i['id']:9}{share(i['busy']):>9}{i['steps']:>9}{i['tokens']:>12}{share(i['prefix_hits']):>13}"
            f"{i['preemptions']:>13}{share(i['max_held_share']):>13}"
        )
    num_left = len(found["instances"]) - MOST_LINES
    return "\n".join(lines + [f"and {num_left} more, which --json tells of"] * (num_left > 0))
