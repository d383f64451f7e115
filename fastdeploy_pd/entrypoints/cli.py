"""The `fastdeploy-pd` command."""

from __future__ import annotations

import argparse
import sys

from fastdeploy_pd import __version__
from fastdeploy_pd.config import ROLES
from fastdeploy_pd.engine.policies import placement_policy, prefill_policy
from fastdeploy_pd.entrypoints import operate, sim_plots
from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.flags import ExactParser, did_you_mean
from fastdeploy_pd.sim import calibrate, plan
from fastdeploy_pd.sim.main import Policies
from fastdeploy_pd.sim.main import add_flags as add_simulate_flags
from fastdeploy_pd.sim.main import run as simulate


def make_parser() -> argparse.ArgumentParser:
    """Returns: the parser of all subcommands."""
    parser = ExactParser(
        prog="fastdeploy-pd", description="A serving cluster with prefill and decode on separate instances."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="{up,serve,role,drain,profile,doctor,simulate,plan,plot,calibrate,version}",
    )
    up = commands.add_parser(
        "up",
        help="start a small cluster on this machine and talk to it",
        description="Starts Redis, a prefill and a decode instance (or as many as asked for), streams a first answer, stays up until "
        "Ctrl-C, and starts again whatever dies.",
    )
    up.add_argument("flags", nargs="*", help="behind `--`: flags for every instance, as of `serve`")
    up.add_argument("--once", action="store_true", help="exit after the first answer")
    up.add_argument("--prefill", type=int, default=1, help="prefill instances (default 1)")
    up.add_argument("--decode", type=int, default=1, help="decode instances (default 1)")
    up.add_argument("--mixed", type=int, default=0, help="mixed instances (default 0)")
    up.add_argument("--model", default="demo", help="checkpoint directory, or `demo`")
    up.add_argument(
        "--ops",
        choices=("paddle", "torch", "reference"),
        help="which framework computes (default: paddle, behind `-- --device cuda` torch)",
    )
    up.add_argument("--prompt", default="Why split prefill and decode?", help="the first question")
    up.add_argument("--port", type=int, help="HTTP port of the first instance (default: a free one)")
    up.add_argument("--redis-url", help="a Redis server that runs already (default: an embedded one)")
    up.add_argument("--scheduler-topic", default="local", help="name of the cluster in Redis (default %(default)s)")
    up.add_argument(
        "--force", action="store_true", help="start more instances than this machine seems to have room for"
    )
    serve = commands.add_parser(
        "serve", help="one instance; flags as of fastdeploy_pd.entrypoints.openai.api_server", add_help=False
    )
    serve.add_argument("flags", nargs=argparse.REMAINDER)
    commands.add_parser(
        "profile", help="measure a model's step times on this machine; flags as of serve", add_help=False
    )
    operate.add_commands(commands)
    _add_doctor(
        commands.add_parser(
            "doctor",
            help="say what this machine, or a pair of machines, can do, and what mends the rest",
            description="One line a check: ok, warn, fail or absent, and what mends it. Exit status 1 if something failed. See docs/doctor.md.",
        )
    )
    _add_simulator(commands)
    commands.add_parser("version", help="print the version")
    for command in commands.choices.values():
        command.set_defaults(parser=command)  # whose usage stands above what is wrong
    return parser


def _add_simulator(commands: argparse._SubParsersAction[ExactParser]) -> None:
    add_simulate_flags(
        commands.add_parser(
            "simulate",
            help="serve a recorded trace on a simulated cluster",
            description="The project's scheduler, block pool and placement on a virtual clock, with measured step times. See docs/simulator.md.",
        )
    )
    plan.add_flags(
        commands.add_parser(
            "plan",
            help="which layout holds a rate, on how few GPUs",
            description="Simulates layouts, chunk sizes and placements, the hopeless ones briefly. See docs/simulator.md.",
        )
    )
    sim_plots.add_flags(
        commands.add_parser(
            "plot",
            help="pictures of what `simulate` has reported",
            description="PNG and SVG of `simulate --json` reports; needs matplotlib. See docs/simulator.md.",
        )
    )
    calibrate.add_flags(
        commands.add_parser(
            "calibrate",
            help="find an engine's step times in a log of its requests",
            description="Fits the simulator's formulas to measured times of requests and says how well. See docs/simulator.md.",
        )
    )


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    sides = doctor.add_mutually_exclusive_group()
    sides.add_argument("--peer", metavar="HOST[:PORT]", help="test the pair with a machine that runs `doctor --listen`")
    sides.add_argument(
        "--listen",
        metavar="[HOST:]PORT",
        help="answer a `doctor --peer` until Ctrl-C (HOST: 0.0.0.0 with a secret, else 127.0.0.1)",
    )
    doctor.add_argument(
        "--redis-url", metavar="URL", help="the cluster's Redis (default: what may run on this machine)"
    )
    doctor.add_argument(
        "--cluster-secret-file", metavar="FILE", help="file with the cluster secret (or FD_CLUSTER_SECRET)"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def main(argv: list[str] | None = None) -> int:
    """Returns: exit status; 2: what was given is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        from fastdeploy_pd.entrypoints.openai.api_server import main as serve

        return serve(argv[1:], "fastdeploy-pd serve")
    if argv[:1] == ["profile"]:
        from fastdeploy_pd.engine.profiler import main as profile

        return profile(argv[1:])
    args, unknown = make_parser().parse_known_args(argv)
    used = args.parser
    del args.parser  # what is left are flags, which reports of `simulate` and `plan` repeat
    if args.command == "role" and not args.role and len(unknown) == 1 and unknown[0] in ROLES:
        args.role = unknown.pop()  # argparse takes no optional word behind flags
    if unknown:
        hint = "; flags of an instance go behind `--`, as in: fastdeploy-pd up -- --cache-transfer-protocol tcp"
        message = f"unrecognized arguments: {' '.join(unknown)}" + (hint if args.command == "up" else "")
        used.error(message + did_you_mean(unknown[0], used))
    if args.command == "version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    is_up = args.command == "up"
    if is_up and (min(args.prefill, args.decode, args.mixed) < 0 or args.decode + args.mixed < 1):
        used.error("--decode and --mixed together must be at least 1, and none of the counts negative")
    try:
        if args.command in ("simulate", "plan"):
            policies = Policies(prefill_policy, placement_policy)
            return simulate(args, policies) if args.command == "simulate" else plan.run(args, policies)
        if args.command in ("plot", "calibrate"):
            return {"plot": sim_plots.run, "calibrate": calibrate.run}[args.command](args)
        if args.command in ("role", "drain"):
            return operate.run(args)
        if is_up:
            from fastdeploy_pd.launch.up import run
        else:
            from fastdeploy_pd.doctor.main import run
        return run(args)
    except FastDeployPDError as error:
        sys.stderr.write(("\n" if is_up else "") + f"error: {error.message}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
