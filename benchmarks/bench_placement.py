"""Two instances under the trace, with front ends, engines and schedulers as they are, a virtual clock and a card's step times.

    python -m benchmarks.bench_placement --layouts 2mixed,1p1d --max-num-batched-tokens 2048,8192

Needs no GPU, and seconds for half a minute of traffic. `fastdeploy-pd simulate` places by what instances do at that very moment, one step
at a time; here front ends know what beats have told them, two steps are in flight, and an engine that launches a step hears nothing.
A request is in time if its first token comes within --slo-ttft-x times what its prompt takes alone, and its TPOT is at most 100 ms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checks import ended, integers, names_of, rates
from benchmarks.trace import NUM_REQUESTS, TraceRequest, load
from benchmarks.virtual import LAYOUTS, MAX_MODEL_LEN, Setting, Traffic, prefill_s
from fastdeploy_pd.core.multiplexing import PLACEMENTS
from fastdeploy_pd.flags import Parser, integer, number
from fastdeploy_pd.machine import check_output, write_json

SHORT_TOKENS = 1500


def measure(setting: Setting, requests: Sequence[TraceRequest], rate: float) -> dict[str, Any]:
    """Returns: what became of the requests, as one row."""
    answers = Traffic(setting, requests, rate).run()
    ttft_s = np.array([a.first_s - a.sent_s for a in answers])
    tpot_s = np.array([(a.last_s - a.first_s) / max(1, a.num_tokens - 1) for a in answers])
    num_input = np.array([r.num_input for r in requests])
    is_late = ttft_s > setting.slo_ttft_x * np.array([prefill_s(int(n)) for n in num_input])
    in_time = ~is_late & (tpot_s <= setting.slo_tpot_s)
    return {
        "layout": setting.layout,
        "placement": setting.placement,
        "step tokens": setting.max_num_batched_tokens,
        "alone": setting.max_lone_prompt_tokens,
        "req/s": rate,
        "in time %": round(100 * float(in_time.mean()), 1),
        f"late below {SHORT_TOKENS}": int(is_late[num_input < SHORT_TOKENS].sum()),
        "late above": int(is_late[num_input >= SHORT_TOKENS].sum()),
        "TTFT ms p50 / p90 / p99": " / ".join(f"{1e3 * t:.0f}" for t in np.percentile(ttft_s, (50, 90, 99))),
        "TPOT ms p50 / p90": " / ".join(f"{1e3 * t:.1f}" for t in np.percentile(tpot_s, (50, 90))),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns: the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layouts", type=names_of(LAYOUTS), default=list(LAYOUTS), help=",".join(LAYOUTS))
    add("--placements", type=names_of(PLACEMENTS), default=["slo"], help=",".join(PLACEMENTS))
    add("--max-num-batched-tokens", type=integers, default=[2048, 8192], metavar="N,...", help="of a step")
    add("--max-lone-prompt-tokens", type=integer(1), metavar="N", help="default: as an instance on a GPU has it")
    add("--rates", type=rates, default=[5, 8, 10, 12], help="req/s")
    add("--requests", type=integer(2, NUM_REQUESTS), default=NUM_REQUESTS, help="of the trace")
    add("--slo-ttft-x", type=number(float, 0.1, 1e6, "a number from 0.1 to 1e6"), default=5.0)
    add("--json", type=Path, help="where to write the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns: 0. Raises: ConfigError: something is wrong; says what."""
    args = parse(argv)
    check_output(args.json)
    requests, rows = load(args.requests, MAX_MODEL_LEN), []
    for layout in args.layouts:
        for placement in args.placements:
            for num_tokens in args.max_num_batched_tokens:
                setting = Setting(layout, placement, num_tokens, args.max_lone_prompt_tokens, args.slo_ttft_x)
                for rate in args.rates:
                    rows.append(row := measure(setting, requests, rate))
                    if len(rows) == 1:
                        sys.stdout.write(f"| {' | '.join(row)} |\n{'|---' * len(row)}|\n")
                    sys.stdout.write(f"| {' | '.join(str(v) for v in row.values())} |\n")
                    sys.stdout.flush()
    if args.json:
        write_json(args.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
