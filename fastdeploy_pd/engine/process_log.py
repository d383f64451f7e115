"""Where the processes of an instance log to: one form for all of them, so that lines of several can be told apart in one file."""

from __future__ import annotations

import logging
from pathlib import Path

from fastdeploy_pd.errors import ConfigError


def configure_process_log(log_dir: str | None, name: str) -> None:
    """Log to stderr, or to log_dir/name.log.

    Args:
        name: "api_server", "engine" or "rank-1", ...
    Raises: ConfigError: the file cannot be written; says why.
    """
    try:
        if log_dir:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            level=logging.INFO,
            format=f"%(asctime)s %(levelname)s {name}[%(process)d] %(message)s",
            filename=str(Path(log_dir) / f"{name}.log") if log_dir else None,
        )
    except OSError as error:
        raise no_log(log_dir, error) from error


def no_log(log_dir: str | None, error: OSError) -> ConfigError:
    """Returns: what to say where FD_LOG_DIR takes no files."""
    return ConfigError(f"FD_LOG_DIR is {log_dir!r}, where no log can be written: {error.strerror}")
