"""Where a simulated instance's step times come from, as the command line says it: grids, a profile's file, or coefficients."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.sim import latency
from fastdeploy_pd.sim.latency import Latency


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `step_times` reads."""
    add = parser.add_argument
    add(
        "--latency",
        type=Path,
        metavar="PATH",
        help="a directory with NAME_prefill.csv and NAME_decode.csv, or a profile's JSON file",
    )
    add("--profile", help="with a directory: which NAME, its words joined by -, as in 70b-h200-tp4")
    add("--latency-model", choices=latency.MODELS, help="how times come from it (default: grid of a directory)")
    add("--prefill-coefficients", metavar="A,B,C", help="in place of --latency: a prompt takes A n^2 + B n + C seconds")
    add("--decode-coefficients", metavar="D,E,F", help="a step takes D KV-tokens + E sequences + F seconds")


def step_times(args: argparse.Namespace) -> Latency:
    """Returns: what the flags ask for. Raises: ConfigError: they say too much or too little, or a file is wrong."""
    coefficients = (args.prefill_coefficients, args.decode_coefficients)
    if coefficients == (None, None):
        if args.latency is None:
            raise ConfigError("--latency must be given, or --prefill-coefficients and --decode-coefficients")
        if args.latency.is_dir():
            if args.profile is None:
                raise ConfigError(f"--profile must be given with --latency {args.latency}, a directory")
            return latency.read(args.latency, args.profile, args.latency_model or "grid")
        _refuse_other_models(args, f"--latency {args.latency}")
        return latency.read_profile(args.latency)
    if None in coefficients:
        raise ConfigError("--prefill-coefficients and --decode-coefficients must be given together")
    if args.latency is not None:
        raise ConfigError(f"--latency {args.latency} and --prefill-coefficients exclude each other")
    _refuse_other_models(args, "--prefill-coefficients")
    prefill, decode = (_numbers(args, name) for name in ("prefill_coefficients", "decode_coefficients"))
    return latency.from_coefficients(prefill, decode)


def _refuse_other_models(args: argparse.Namespace, where: str) -> None:
    if args.latency_model not in (None, "formula"):
        raise ConfigError(f"--latency-model is {args.latency_model}; with {where} it must be formula")


def _numbers(args: argparse.Namespace, name: str) -> list[float]:
    text = getattr(args, name)
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise ConfigError(f"--{name.replace('_', '-')} is {text!r}; it must be three numbers, as in 1.4e-9,1e-4,0.01")
    return numbers
