"""How a recipe starts: check the configuration, start the ranks, end with one clear line.

Started by hand, a recipe checks its inputs and becomes a torchrun of its own with
`parallel.num_ranks` processes; started once a node by a cluster's script
(`opcd_nemo/storage/attempt.py`), the same with this node's share of them. Started by torchrun or
srun it is a rank. Bad input ends with exit code 2 and one line on rank 0.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from opcd_nemo.config.train import ParallelConfig, load_config
from opcd_nemo.distributed.groups import LAUNCHER_PID_ENV, choose_device, choose_layer_spec
from opcd_nemo.errors import (
    CheckFailed,
    NonFiniteError,
    SaveError,
    StoppedByFile,
    StoppedBySignal,
    UserError,
)
from opcd_nemo.storage.attempt import Nodes, ranks_here, this_attempt, this_node
from opcd_nemo.training.inputs import open_inputs

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # by a signal, with a checkpoint: start the same command again
EXIT_DO_NOT_RESTART = 93  # somebody wants the run to end
_STOPS: dict[type[Exception], int] = {
    StoppedBySignal: EXIT_STOPPED,
    StoppedByFile: EXIT_DO_NOT_RESTART,
}
CONF = Path(__file__).resolve().parents[2] / "conf"
Main = Callable[[DictConfig, Callable[[str], None]], object]
LaunchCheck = Callable[[DictConfig, Callable[[str], None]], ParallelConfig | None]


def check_run(raw: DictConfig, _: Callable[[str], None]) -> ParallelConfig | None:
    """Check a training run's configuration and inputs; returns its layout."""
    config = load_config(raw)
    device, _reason = choose_device(config.parallel.device, ranks_here(config.parallel.num_ranks))
    choose_layer_spec(config.parallel.layer_spec, device)
    open_inputs(config, config.parallel.num_ranks)
    return config.parallel


def run_recipe(
    load_main: Callable[[], Main], config_name: str, check: LaunchCheck = check_run
) -> NoReturn:
    """Run a recipe as a launcher or as a rank, and exit.

    Args:
        load_main: imports and returns the recipe's main (heavy imports stay out of the launcher).
        config_name: a file of `conf/`, without its ending.
        check: what the launcher looks at, and the layout to start; None: there is nothing to start.
    """
    is_rank = "RANK" in os.environ or os.environ.get("WORLD_SIZE") == "1"

    def run() -> int:
        return _run_rank(load_main, config_name) if is_rank else _launch_ranks(check, config_name)

    _run_and_exit(run, config_name)


def run_alone(load_main: Callable[[], Main], config_name: str) -> NoReturn:
    """Run a recipe in this process, as its only rank, and exit; its main may return the code."""

    def run() -> int:
        config = compose(config_name, sys.argv[1:])
        quiet_libraries()
        code = load_main()(config, _say)
        return code if isinstance(code, int) else 0

    _run_and_exit(run, config_name)


def _run_and_exit(run: Callable[[], int], config_name: str) -> NoReturn:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing pages
    # packed streams differ in length at every step, and oneDNN and torch keep compiled code for
    # each shape: 1024 of them by default cost 15 MiB a step and save nothing (docs/log.md)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    warnings.filterwarnings("ignore")  # megatron-core misses apex a dozen times
    # megatron-core imports it, and a CUDA build of torch misses the GPU where nvcc is installed
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    try:
        code = run()
    except Exception as error:  # the interpreter must not end on its own, see below
        code = report_error(error, config_name)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo aborts when its groups are torn down at interpreter exit


def quoted(override: str) -> str:
    """Quotes around a plain value with an equals sign, which Hydra wants: `path='step=3.ckpt'`."""
    key, _, value = override.partition("=")
    plain = "=" in value and re.search(r"""['"{}\[\](),]""", value) is None
    return f"{key}='{value}'" if plain else override


def report_error(error: Exception, config_name: str) -> int:
    """Print one line for what a user can mend, a traceback for the rest; returns the exit code."""
    if type(error) in _STOPS:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{error}\n")
        return _STOPS[type(error)]
    line = _one_line(error, config_name)
    if line is None and not isinstance(error, CheckFailed | NonFiniteError | SaveError):
        traceback.print_exception(error)
        return EXIT_FAILURE
    spoken_for = LAUNCHER_PID_ENV in os.environ and "RANK" in os.environ  # the launcher prints it
    if os.environ.get("RANK", "0") == "0" and not spoken_for:
        sys.stderr.write(f"error: {line or error}\n")
    return EXIT_BAD_INPUT if line else EXIT_FAILURE


def _one_line(error: Exception, config_name: str) -> str | None:
    """What is wrong with the input and what is allowed; None when the input is not to blame."""
    from hydra.errors import HydraException

    if isinstance(error, HydraException):
        return _explain_hydra(error, config_name)
    if isinstance(error, OmegaConfBaseException):
        fields = ", ".join(getattr(error.object_type, "__dataclass_fields__", ()))
        return f"{error.full_key}: {str(error).splitlines()[0]}; allowed: {fields or 'see conf/'}"
    if isinstance(error, UserError):
        return str(error)
    refused = isinstance(error, ValueError) and "allowed" in str(error)  # as every refusal says
    return " ".join(str(error).split()) if refused else None


def _explain_hydra(error: Exception, config_name: str) -> str:
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        lines = [line.strip() for line in str(error).splitlines()]
        shown = [line for line in lines if line and not line.startswith(("See ", "Config search"))]
        return f"{'; '.join(shown)}; allowed: key=value with a key of conf/{config_name}.yaml"
    key = unknown[1]
    given = next((text for text in sys.argv[1:] if text.startswith(f"{key}=")), key)
    group, names = "", compose(config_name, [])
    for part in key.split(".")[:-1]:
        child = names.get(part)
        if not isinstance(child, DictConfig):
            break
        group, names = f" in {part}" if not group else f"{group}.{part}", child
    return f"{given}: no such key; allowed{group}: {', '.join(map(str, names))}"


def _run_rank(load_main: Callable[[], Main], config_name: str) -> int:
    # from a watchdog: the rank shows what each thread is doing, and dies
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=True)
    from torch.distributed.elastic.multiprocessing.errors import record

    telemetry = logging.getLogger("nv_one_logger")  # NeMo's; on screen from its import on
    telemetry.addHandler(logging.NullHandler())
    telemetry.propagate = False
    if LAUNCHER_PID_ENV in os.environ or os.environ.get("RANK", "0") != "0":
        # what a task's files hold is said once: by the launcher, which opens them first
        logging.getLogger("opcd_nemo.tasks.splits").setLevel(logging.ERROR)
    main = load_main()
    from nemo.core.config import hydra_runner

    quiet_libraries()

    failures: list[Exception] = []  # Hydra must not see them: it prints the whole command again

    def task(config: DictConfig) -> None:
        try:
            main(config, _say)
        except Exception as error:
            failures.append(error)

    @record
    def run() -> None:
        hydra_runner(config_path=str(CONF), config_name=config_name)(task)()
        for error in failures:
            raise error

    run()
    return 0


def quiet_libraries() -> None:
    """Keep third parties' notes off the screen; their errors stay."""
    from nemo.utils import logging as nemo_logging

    warnings.filterwarnings("ignore")
    nemo_logging.setLevel(logging.ERROR)
    for name in ("lightning", "lightning.pytorch", "megatron.core", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration as `hydra_runner` does."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    _check_choices(overrides)
    with initialize_config_dir(str(CONF), version_base=None):
        composed = hydra_compose(config_name, overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # run names interpolate Hydra's choices
    config = composed.copy()
    with open_dict(config):
        config.pop("hydra")
    return config


def _check_choices(overrides: list[str]) -> None:
    """Refuse `group=3`, to which Hydra answers without naming the group."""
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")
        files = sorted(path.stem for path in (CONF / group).glob("*.yaml")) if group else []
        if files and name not in files:
            raise ValueError(
                f"{override}: no such file in conf/{group}; allowed: {', '.join(files)}"
            )


def _launch_ranks(check: LaunchCheck, config_name: str) -> int:
    """Check everything, then run the same command as `parallel.num_ranks` ranks.

    A child checks: what it imports for that (engines, Megatron) is not held beside the ranks.
    """
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=_check, args=(check, config_name, writer))
    child.start()
    child.join()
    if child.exitcode:
        return child.exitcode
    parallel = reader.recv()
    return 0 if parallel is None else _torchrun(parallel)


def _check(check: LaunchCheck, config_name: str, writer: Connection) -> None:
    """Send the layout of a configuration that is in order, or report and exit."""
    try:
        parallel = check(compose(config_name, sys.argv[1:]), _say)
        if parallel is not None:
            _check_port(parallel.port, this_node())
    except Exception as error:
        sys.exit(report_error(error, config_name))
    writer.send(parallel)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # a recipe's output


def _check_port(port: int, node: Nodes | None) -> None:
    if port == 0:
        return
    if node is not None:
        raise ValueError(f"parallel.port={port}: allowed: 0, the ranks meet at {node.rendezvous}")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"parallel.port={port}: {error.strerror}; allowed: a free port, or 0 for any"
            ) from error


def _torchrun(parallel: ParallelConfig) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    node = this_node()
    os.environ["OMP_NUM_THREADS"] = str(parallel.threads_per_rank)
    os.environ[LAUNCHER_PID_ENV] = str(os.getpid())
    if parallel.device != "cpu" and needs_one_connection(parallel):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    settings = LaunchConfig(
        **_rendezvous(parallel, node),
        max_restarts=0,
        monitor_interval=0.5,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(one, _forward_to_ranks)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    try:
        elastic_launch(settings, sys.executable)(*["-u", *sys.argv])
    except ChildFailedError as error:
        rank, failure = _first_failure(error.failures)
        if failure.exitcode in _STOPS.values():  # rank 0 has said why
            return failure.exitcode
        where = "" if node is None else f" on {socket.gethostname()}"
        sys.stderr.write(f"error: rank {rank} failed first{where}: {_first_line(failure)}\n")
        return failure.exitcode if failure.exitcode > 0 else EXIT_FAILURE
    return 0


def needs_one_connection(parallel: ParallelConfig) -> bool:
    """Whether Megatron relies on the order of kernels in one hardware queue.

    It lets communication of tensor and context parallelism start before the computation that
    hides it: on GPUs before Blackwell that takes `CUDA_DEVICE_MAX_CONNECTIONS=1`.
    """
    return parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1


def _rendezvous(parallel: ParallelConfig, node: Nodes | None) -> dict[str, Any]:
    """Where the ranks meet: on this machine, or at the first node, in the order of the nodes."""
    if node is None:
        return {
            "min_nodes": 1,
            "max_nodes": 1,
            "run_id": str(os.getpid()),
            "nproc_per_node": parallel.num_ranks,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": f"127.0.0.1:{parallel.port}",
            "local_addr": "127.0.0.1",  # a container may not find its own name
        }
    return {
        "min_nodes": node.count,
        "max_nodes": node.count,
        # neither an attempt that lingers nor the run before this one is met
        "run_id": f"{this_attempt()}.{zlib.crc32(' '.join(sys.argv).encode())}",
        "nproc_per_node": node.ranks_per_node(parallel.num_ranks),
        "rdzv_backend": "static",
        "rdzv_endpoint": node.rendezvous,
        "rdzv_configs": {"rank": node.rank, "timeout": parallel.timeout_s},
    }


def _forward_to_ranks(number: int, _: FrameType | None) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "LOCAL_RANK" in child.environ():
                child.send_signal(number)


def _first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed on its own.

    A process that ends without an exception leaves no time of its own; the exceptions of the
    others, who lost their peer, are later than its end though earlier than its discovery.
    """
    silent = {rank: one for rank, one in failures.items() if not isinstance(one.message, dict)}
    if silent:
        return min(silent.items(), key=lambda item: item[1].timestamp)
    written = {rank: Path(one.error_file).stat().st_mtime_ns for rank, one in failures.items()}
    rank = min(written, key=written.__getitem__)  # `timestamp` is in whole seconds
    return rank, failures[rank]


def _first_line(failure: ProcessFailure) -> str:
    if not isinstance(failure.message, dict):
        return f"it ended without an exception, exit code {failure.exitcode}"
    lines = [line.strip() for line in str(failure.message["message"]).splitlines()]
    return next((line for line in lines if line), f"exit code {failure.exitcode}")
