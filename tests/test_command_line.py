"""What is said to who gives a wrong flag."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--modle", "demo"], "there is no flag --modle; did you mean --model?"),
        (["--prt", "1"], "there is no flag --prt; did you mean --port?"),
        (["--swap-space", "4GB"], "--swap-space: '4GB' is not allowed; it must be a number of GiB from 0 to 65536"),
        (
            ["--num-gpu-blocks-override", "100000000000"],
            "--num-gpu-blocks-override: '100000000000' is not allowed; it must be an integer from 1 to 2147483647",
        ),
        (["demo"], "'demo' belongs to no flag; a model is given as --model demo"),
        (["--port", "99999"], "--port: '99999' is not allowed; it must be an integer from 1 to 65535"),
        (["--data-parallel-size", "2"], "--data-parallel-size 2 is not part of this version"),
        (
            ["--tensor-parallel-size", "0"],
            "--tensor-parallel-size: '0' is not allowed; it must be an integer from 1 to 64",
        ),
        (
            ["--tensor-parallel-size", "4", "--cache-queue-port", "65533"],
            "--cache-queue-port is 65533; with 4 ranks, a port each, it must be at most 65532",
        ),
        (
            ["--tensor-parallel-size", "2", "--cache-queue-port", "7000", "--pd-comm-port", "7001"],
            "--pd-comm-port and --cache-queue-port are both 7001; each needs a port of its own",
        ),
        (["--api-key", ""], "--api-key: '' is not allowed; it must be at least one character, without spaces around"),
        (
            ["--tensor-parallel-size", "2", "--swap-space", "1"],
            "--swap-space is 1 GiB; with several ranks or --no-enable-prefix-caching it must be 0",
        ),
        (
            ["--max-lone-prompt-tokens", "100"],
            "--max-lone-prompt-tokens is 100; it must be at least --max-num-batched-tokens (2048)",
        ),
    ],
)
def test_an_instance_says_what_is_wrong(flags: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        InstanceConfig.from_args(flags, {})
    assert error.value.message.startswith(text)


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ([], 2048),
        (["--device", "cuda"], 8192),
        (["--device", "cuda", "--max-num-batched-tokens", "512"], 2048),
        (["--device", "cuda", "--max-num-batched-tokens", "16384"], 16384),
        (["--max-lone-prompt-tokens", "5000"], 5000),
    ],
)
def test_a_prompt_that_is_alone_gets_more_tokens_a_step_on_a_gpu(flags: list[str], most: int) -> None:
    assert InstanceConfig.from_args(flags, {}).scheduling.max_lone_prompt_tokens == most


@pytest.mark.parametrize("scheduler", ["local", "splitwise"])
def test_a_transfer_that_is_not_there_is_refused_by_whoever_would_use_it_or_not(scheduler: str) -> None:
    flags = ["--cache-transfer-protocol", "foo,tcp", "--scheduler-name", scheduler]
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.openai.api_server", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    text = "error: --cache-transfer-protocol names 'foo'; there are ipc, mooncake, nccl, rdma, shm, tcp"
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(text), done.stderr


@pytest.mark.parametrize(
    ("flags", "env", "text"),
    [
        (["--ready-file", "/nope/ready"], {}, "--ready-file is '/nope/ready', which is in no directory that exists; "),
        (["--ready-file", "/tmp"], {}, "--ready-file is '/tmp', which is a directory; it must be a file's path"),
        ([], {"FD_LOG_DIR": "/dev/null"}, "FD_LOG_DIR is '/dev/null', where no log can be written: File exists"),
        (
            ["--device", "cuda", "--ops", "torch", "--tensor-parallel-size", "2"],
            {"CUDA_VISIBLE_DEVICES": "-1"},
            "--device is 'cuda'; torch cannot use one here: there is no NVIDIA driver or GPU: ",
        ),
    ],
    ids=lambda v: v[0] if isinstance(v, list) and v else "",
)
def test_an_instance_that_cannot_be_ends_with_one_line(flags: list[str], env: dict[str, str], text: str) -> None:
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.openai.api_server", "--model", "demo", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})
    assert done.returncode == 2 and done.stderr.startswith(f"error: {text}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--bogus", "--enable-expert-parallel", "--quantization", "--x"])
def test_nothing_far_is_suggested(flag: str) -> None:
    with pytest.raises(ConfigError) as error:
        InstanceConfig.from_args([flag], {})
    assert error.value.message == f"there is no flag {flag}"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["up", "--cache-transfer-protocol", "tcp"], "go behind `--`, as in: fastdeploy-pd up -- --cache-transfer"),
        (["up", "--modle=demo"], "up -- --cache-transfer-protocol tcp; did you mean --model?\n"),
        (["up", "--decode", "0"], "fastdeploy-pd up: error: --decode and --mixed together must be at least 1"),
        (["doctor", "--frobnicate"], "fastdeploy-pd doctor: error: unrecognized arguments: --frobnicate\n"),
        (
            ["simulate", "--trace", "x", "--layout", "1M", "--slo-tpot-sm", "9"],
            "fastdeploy-pd simulate: error: unrecognized arguments: --slo-tpot-sm 9; did you mean --slo-tpot-ms?\n",
        ),
        (["role", "x", "--redis-ulr=y"], "arguments: --redis-ulr=y; did you mean --redis-url?\n"),
        (["up", "--prefil", "2"], "unrecognized arguments: --prefil;"),
        (
            ["drain", "x", "--timeout-s", "nan"],
            "argument --timeout-s: 'nan' is not allowed; it must be seconds from 0 to 86400",
        ),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and text in capsys.readouterr().err
