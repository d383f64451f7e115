"""The simulator's claims (docs/simulator.md), each in one part: tables go to stdout, how far it is to stderr. It needs no network.

    python -m benchmarks.bench_sim --trace conversation_trace.jsonl.gz --peer VENV/bin/python     # pip install ai-dynamo==1.4.2 numpy
    python -m benchmarks.bench_sim --only static,speed                                            (the 300 requests in benchmarks/data)

peer: our scheduling beside that of NVIDIA's DynoSim (`dynamo.replay`), simulated both, on the same trace, step times and objectives.
agreement: the two simulators when both place by turns.
tropical: published schedulers in the setting of Tropical's paper, and up to which rate each has 90 % of the requests in time.
static: `auto:8` beside every fixed division of eight instances, at 0.25 to 1.5 times what it can about hold.
speed: seconds, memory and times real time of eight instances. Run it alone.
large: the same of 10,000 instances and 84 times the trace; takes a quarter of an hour or more.

Objectives are TTFT <= 5 x the unloaded prefill time and TPOT <= 100 ms, over all offered requests.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.sim_parts import PARTS, Setup
from benchmarks.simulations import Row
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.machine import check_output, write_json
from fastdeploy_pd.sim.main import check_positive

SAMPLE = Path(__file__).parent / "data" / "mooncake_conversation.jsonl.gz"


def parts_of(text: str) -> list[str]:
    """Returns: "peer,static" as names of parts. Raises: ArgumentTypeError: there is no such part."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return names


def make_parser() -> argparse.ArgumentParser:
    """Returns: the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in PARTS if name != "large"]
    parser.add_argument("--only", type=parts_of, default=usual, metavar="PART,...", help="default: all but large")
    parser.add_argument("--trace", type=Path, default=SAMPLE, help="Mooncake's JSON lines, .gz or not")
    parser.add_argument("--max-requests", type=int, metavar="N", help="the trace's first N alone, for a try")
    parser.add_argument("--peer", help="a Python that has ai-dynamo 1.4.2 and numpy; without it ours alone")
    parser.add_argument("--jobs", type=int, default=1, help="simulations at once, except where time is measured")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the rows go, by part")
    return parser


def main() -> int:
    """Returns: exit status."""
    parser = make_parser()
    args = parser.parse_args()
    if args.peer and not shutil.which(args.peer):
        parser.error(f"--peer {args.peer} is no program; it must be a Python that has ai-dynamo 1.4.2 and numpy")
    try:
        check_positive(args, "max_requests", "jobs")
        check_output(args.json)
    except ConfigError as error:
        parser.error(error.message)
    setup = Setup(args.trace.resolve(), args.peer, args.max_requests, args.jobs)
    found: dict[str, list[Row]] = {}
    for name in args.only:
        try:
            found[name], text = PARTS[name](setup)
        except ConfigError as error:
            raise SystemExit(f"{name}: {error.message}") from error
        sys.stdout.write(f"## {name}\n\n{text}\n\n")
        sys.stdout.flush()
        if args.json:
            write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
