"""How a recipe starts: check the configuration, start the ranks, end with one clear line.

Started by hand, a recipe checks its inputs and becomes a torchrun of its own with
`parallel.num_ranks` processes. Started by torchrun or srun it is a rank. Bad input ends with exit
code 2 and one line on rank 0.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from opcd_nemo.config import TrainConfig, load_config
from opcd_nemo.inputs import open_inputs

EXIT_BAD_INPUT = 2
LAUNCHER_PID_ENV = "OPCD_LAUNCHER_PID"
CONF = Path(__file__).resolve().parent.parent / "conf"
Main = Callable[[DictConfig, Callable[[str], None]], object]


def run_recipe(load_main: Callable[[], Main], config_name: str) -> NoReturn:
    """Run a recipe as a launcher or as a rank, and exit.

    Args:
        load_main: imports and returns the recipe's main (heavy imports stay out of the launcher).
        config_name: a file of `conf/`, without its ending.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing pages
    is_rank = "RANK" in os.environ or os.environ.get("WORLD_SIZE") == "1"
    try:
        code = _run_rank(load_main, config_name) if is_rank else _launch(config_name)
    except _bad_input_errors() as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {_one_line(error)}\n")
        code = EXIT_BAD_INPUT
    for child in multiprocessing.active_children():  # Megatron's checkpoint writer keeps one
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo aborts when its groups are torn down at interpreter exit


def _bad_input_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException

    return (ValueError, HydraException)


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if error.__cause__ is not None and "override" in str(error) else None
    lines = str(error).splitlines()
    if cause is not None:
        lines.append(str(cause).splitlines()[0])
    return " ".join(line.strip() for line in lines if line.strip())


def _run_rank(load_main: Callable[[], Main], config_name: str) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record

    quiet_libraries()
    main = load_main()
    from nemo.core.config import hydra_runner

    def task(config: DictConfig) -> None:
        main(config, lambda line: print(line, flush=True))  # noqa: T201  # a recipe's output

    record(hydra_runner(config_path=str(CONF), config_name=config_name)(task))()
    return 0


def quiet_libraries() -> None:
    """Leave warnings and progress of third parties to their own log files."""
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("nemo_logger", "lightning", "lightning.pytorch", "megatron.core", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration as `hydra_runner` does."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base=None):
        return hydra_compose(config_name, overrides=overrides, return_hydra_config=True)


def _launch(config_name: str) -> int:
    """Check everything, then run the same command as `parallel.num_ranks` ranks."""
    raw = compose(config_name, sys.argv[1:])
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(raw)
    plain = raw.copy()
    from omegaconf import open_dict

    with open_dict(plain):
        plain.pop("hydra")
    config = load_config(plain)
    open_inputs(config, config.parallel.num_ranks)
    _check_port(config.parallel.port)
    return _torchrun(config)


def _check_port(port: int) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"parallel.port={port}: {error.strerror}; allowed: a free port, or 0 for any"
            ) from error


def _torchrun(config: TrainConfig) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = str(config.parallel.threads_per_rank)
    os.environ[LAUNCHER_PID_ENV] = str(os.getpid())
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.parallel.num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{config.parallel.port}",
        max_restarts=0,
        monitor_interval=0.5,
    )
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    try:
        elastic_launch(settings, sys.executable)(*["-u", *sys.argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"error: rank {rank} failed first (exit code {failure.exitcode}): "
                         f"{_last_line(failure.message)}\n")
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _last_line(message: object) -> str:
    text = message.get("message", "") if isinstance(message, dict) else str(message)
    lines = [line for line in str(text).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
