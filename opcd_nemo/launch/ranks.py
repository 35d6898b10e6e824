"""How a command's processes start: a launcher that checks, and the ranks that it starts.

Started by hand, a command checks its inputs and then starts `parallel.num_ranks` ranks through
torchrun's own functions; started once a node by a cluster's script
(`opcd_nemo/storage/attempt.py`), it starts this node's share of them. Started by torchrun or srun,
a command is a rank.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig

from opcd_nemo.config.train import ParallelConfig, load_config
from opcd_nemo.distributed.devices import choose_device, choose_layer_spec
from opcd_nemo.distributed.groups import keep_on_loopback
from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV, end_with_parent, launcher_has_ended
from opcd_nemo.errors import SaveError, UserError
from opcd_nemo.launch.child import in_child
from opcd_nemo.launch.compose import as_override, compose
from opcd_nemo.launch.exits import EXIT_FAILURE, STOPS, report_error
from opcd_nemo.launch.output import keep_output_open, quiet_imports, quiet_libraries, show_log
from opcd_nemo.launch.recipes import CONF, for_another_program, of_program
from opcd_nemo.launch.signals import ToRanks, in_words, stopped
from opcd_nemo.rollout.engine import check_engine
from opcd_nemo.storage.attempt import Nodes, ranks_here, this_attempt, this_node
from opcd_nemo.storage.hub import OFFLINE_ENV
from opcd_nemo.training.prepared import prepare_run

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

Main = Callable[[DictConfig], object]
LaunchCheck = Callable[[DictConfig], ParallelConfig | None]
PROGRAM = ("-u", "-P", "-m", "opcd_nemo.cli")  # -P: files of this folder hide no library


def check_run(raw: DictConfig) -> ParallelConfig | None:
    """Check a training run's configuration and inputs; returns its layout."""
    config = load_config(raw)
    parallel = config.parallel
    device, _reason = choose_device(parallel.device, ranks_here(parallel.num_ranks))
    choose_layer_spec(parallel.layer_spec, device)
    inputs = prepare_run(raw).inputs
    models = (inputs.student_config, inputs.teacher_config)
    on_cpu = device.type == "cpu"
    check_engine(config.engine, models, inputs.longest_tokens, on_cpu=on_cpu)
    return parallel


def is_rank() -> bool:
    """Whether torchrun or srun has started this process."""
    return "RANK" in os.environ or os.environ.get("WORLD_SIZE") == "1"


def run_in_ranks(
    words: Sequence[str],
    load_main: Callable[[], Main],
    config_name: str,
    check: LaunchCheck = check_run,
) -> NoReturn:
    """Run a command as a launcher or as a rank, and exit.

    Args:
        words: the command's name and its overrides, with which the ranks are started.
        load_main: imports and returns what a rank does (heavy imports stay out of the launcher).
        config_name: a file of `conf/`, without its ending.
        check: checks in the launcher and returns the layout to start; None: nothing is started.
    """
    overrides = words[1:]
    if is_rank():
        run_and_exit(lambda: run_rank(overrides, load_main, config_name))

    def launch() -> int:
        code, parallel = _checked(overrides, check, config_name)
        return code if parallel is None else launch_ranks(words, parallel)

    run_and_exit(launch)


def run_alone(
    overrides: Sequence[str], load_main: Callable[[], Main], config_name: str
) -> NoReturn:
    """Run a command in a child, as its only rank, and exit; its main may return the code."""

    def run() -> int:
        config = compose(config_name, overrides)
        quiet_libraries()
        try:
            code = load_main()(config)
        except UserError as error:
            raise for_another_program(error, config_name) from error
        return code if isinstance(code, int) else 0

    run_and_exit(lambda: in_child(run))


def run_and_exit(run: Callable[[], int]) -> NoReturn:
    """End this process with what `run` returns, or with the line or traceback of its error."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing pages
    keep_few_kernels()
    quiet_imports()
    keep_output_open()
    show_log(first_rank=os.environ.get("RANK", "0") == "0")
    try:
        code = run()
    except (Exception, KeyboardInterrupt) as error:  # the interpreter must not end by itself
        code = report_error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo aborts when its groups are torn down at interpreter exit


def keep_few_kernels() -> None:
    """Limit the compiled code that oneDNN and torch keep, one piece for each shape.

    Packed streams differ in length at every step: 1024 pieces, the default, cost 15 MiB a step and
    save nothing (docs/log.md).
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")


def run_rank(overrides: Sequence[str], load_main: Callable[[], Main], config_name: str) -> int:
    """Do a rank's part; returns 0, or raises the error that ended the rank.

    Raises:
        UserError: a key is wrong, or the environment makes this rank one of another world.
    """
    end_with_parent()
    if launcher_has_ended():  # before the kernel knew of this rank
        raise RuntimeError("the launcher of this rank has ended")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher reports Ctrl-C
    # from a watchdog: the rank shows what each thread is doing, and dies
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=True)
    from torch.distributed.elastic.multiprocessing.errors import record

    if LAUNCHER_PID_ENV in os.environ or os.environ.get("RANK", "0") != "0":
        # notes about files are shown once, by the launcher, which opens the files first
        for name in ("tasks.splits", "formats", "training.inputs"):
            logging.getLogger(f"opcd_nemo.{name}").setLevel(logging.ERROR)
    main = load_main()
    from nemo.core.config import hydra_runner

    quiet_training()

    failures: list[Exception] = []  # not for Hydra, which prints the command again

    def task(config: DictConfig) -> None:
        try:
            main(of_program(config_name, config))
        except Exception as error:
            failures.append(error)

    @record
    def run() -> None:
        config = compose(config_name, overrides)  # its errors are a line, Hydra's pages
        _check_world(config.parallel.num_ranks)
        sys.argv[1:] = [as_override(word) for word in overrides]
        hydra_runner(config_path=str(CONF), config_name=config_name)(task)()
        for error in failures:
            raise error

    run()
    return 0


def _check_world(num_ranks: int) -> None:
    """Refuse the variables of a pod that is no rank: Kubernetes sets them without a launcher."""
    world = os.environ.get("WORLD_SIZE", "1")
    if "LOCAL_RANK" not in os.environ and world != str(num_ranks):
        start = "`env -u RANK -u WORLD_SIZE opcd ...`, which starts the ranks itself"
        allowed = f"{num_ranks} as parallel.num_ranks; or {start}"
        raise UserError("WORLD_SIZE", world, allowed, where="the environment")


def quiet_training() -> None:
    """Keep off the screen what the libraries of a training note; after their import, which talks.

    Only a process that trains imports NeMo.
    """
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    quiet_libraries()


def _checked(
    overrides: Sequence[str], check: LaunchCheck, config_name: str
) -> tuple[int, ParallelConfig | None]:
    """The exit code of the check, and the layout to start, if any.

    A child process checks: its imports (engines, Megatron) take no memory beside the ranks.
    """
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    child = fork.Process(target=_check, args=(overrides, check, config_name, writer))
    child.start()
    child.join()
    code = child.exitcode or 0
    if code < 0:  # as when memory is short: the child could not say it
        words = f"the process that checks the inputs was ended by {in_words(-code)}"
        sys.stderr.write(f"error: {words}\n")
        return EXIT_FAILURE, None
    return (code, None) if code else (0, reader.recv())


def _check(
    overrides: Sequence[str], check: LaunchCheck, config_name: str, writer: Connection
) -> None:
    """Send the layout of a configuration that is in order, or report and exit."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # the launcher reports the signal
    try:
        parallel = check(compose(config_name, overrides))
        if parallel is not None:
            _check_port(parallel.port, this_node())
    except Exception as error:
        sys.exit(report_error(for_another_program(error, config_name)))
    writer.send(parallel)


def _check_port(port: int, node: Nodes | None) -> None:
    if port == 0:
        return
    if node is not None:
        raise UserError("parallel.port", port, f"0, the ranks meet at {node.rendezvous}")
    with socket.socket() as probe:
        # ranks that have just ended on this port leave it in use for a minute by TCP's rules alone
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            free = "a free port, or 0 for any"
            raise UserError("parallel.port", port, free, problem=error.strerror) from error


def launch_ranks(words: Sequence[str], parallel: ParallelConfig, number: int = 0) -> int:
    """Start this node's ranks of a layout and wait for them; returns the first failure's code.

    Args:
        words: what each rank runs: `python -m opcd_nemo.cli` with these words.
        parallel: a checked layout.
        number: how many launches this process has done before.

    Raises:
        UserError: `parallel.port` is in use.
        KeyboardInterrupt: Ctrl-C; the ranks have ended.
        SaveError: the folder of temporary files does not hold what a failed rank said.
        StoppedBySignal: a signal came while not every rank was at work; they have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from opcd_nemo.launch.meeting import BACKEND, offer_meeting

    node = this_node()
    _check_port(parallel.port, node)
    if node is None:
        keep_on_loopback()
    os.environ["OMP_NUM_THREADS"] = str(parallel.threads_per_rank)
    os.environ[LAUNCHER_PID_ENV] = str(os.getpid())
    # the check has fetched what the run reads of the hub: the ranks read the cache alone
    os.environ.setdefault(OFFLINE_ENV, "1")
    if parallel.device != "cpu" and needs_one_connection(parallel):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    offer_meeting()
    settings = LaunchConfig(
        **_rendezvous(words, parallel, node, number),
        rdzv_backend=BACKEND,
        max_restarts=0,
        monitor_interval=0.5,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    for name in ("torch", *filter(_is_torchs, logging.root.manager.loggerDict)):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # some loggers have other levels
    try:
        with ToRanks(settings.nproc_per_node) as signals:
            elastic_launch(settings, sys.executable)(*PROGRAM, *words)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        sys.stderr.write(f"stopped by {error.sigval.name}\n")
        return 128 + error.sigval
    except ChildFailedError as error:
        return _report_failure(error.failures, signals.received, node)
    except json.JSONDecodeError as error:  # torch's launcher reads what a rank wrote as it ended
        folder = tempfile.gettempdir()
        words = f"a rank has failed, and {folder} does not hold what it said: it may be full"
        raise SaveError(words) from error
    return 0


def _is_torchs(name: str) -> bool:
    return name.startswith("torch.distributed.elastic")


def _report_failure(failures: dict[int, ProcessFailure], received: int, node: Nodes | None) -> int:
    """Print why the ranks ended; returns the exit code."""
    if received and -received in {failure.exitcode for failure in failures.values()}:
        return report_error(stopped(received))
    rank, failure = _first_failure(failures)
    line = _first_line(failure)
    if failure.exitcode in STOPS.values():
        for stop in STOPS:
            line = line.removeprefix(f"{stop.__name__}: ")
        sys.stderr.write(f"{line}\n")
        return failure.exitcode
    where = "" if node is None else f" on {socket.gethostname()}"
    sys.stderr.write(f"error: rank {rank} failed first{where}: {line}\n")
    return failure.exitcode if failure.exitcode > 0 else EXIT_FAILURE


def needs_one_connection(parallel: ParallelConfig) -> bool:
    """Whether Megatron relies on the order of kernels in a single hardware queue.

    It lets communication of tensor and context parallelism start before the computation that
    hides it: on GPUs before Blackwell that takes `CUDA_DEVICE_MAX_CONNECTIONS=1`.
    """
    return parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1


def _rendezvous(
    words: Sequence[str], parallel: ParallelConfig, node: Nodes | None, number: int = 0
) -> dict[str, Any]:
    """Where the ranks meet: on this machine, or at the first node, in the order of the nodes.

    Two launches that follow each other meet at two ports of the first node: a node that goes on
    sooner would otherwise meet the first node's store of the launch before, which is about to end.
    """
    if node is None:
        return {
            "min_nodes": 1,
            "max_nodes": 1,
            "run_id": f"{os.getpid()}.{number}",
            "nproc_per_node": parallel.num_ranks,
            "rdzv_endpoint": f"127.0.0.1:{parallel.port}",  # no other machine takes part
            "rdzv_configs": {"rank": 0},
            "local_addr": "127.0.0.1",  # a container may not find its own name
        }
    host, _, port = node.rendezvous.rpartition(":")
    return {
        "min_nodes": node.count,
        "max_nodes": node.count,
        # neither an attempt that lingers nor the run before this one is met
        "run_id": f"{this_attempt()}.{zlib.crc32(' '.join(words).encode())}",
        "nproc_per_node": node.ranks_per_node(parallel.num_ranks),
        "rdzv_endpoint": f"{host}:{int(port) + number % 2}",
        "rdzv_configs": {"rank": node.rank, "timeout": math.ceil(parallel.timeout_s)},
    }


def _first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, not because of another rank.

    A process that ends without an exception leaves no time of its own; the exceptions of the
    others, who lost their peer, are later than its end though earlier than its discovery.
    """
    silent = {
        rank: failure for rank, failure in failures.items() if not isinstance(failure.message, dict)
    }
    # the launcher ends the others with SIGTERM, which some meet before they can take it
    died = {
        rank: failure for rank, failure in silent.items() if failure.exitcode != -signal.SIGTERM
    }
    if died or len(silent) == len(failures):
        return min((died or silent).items(), key=lambda item: item[1].timestamp)
    written = {
        rank: Path(failure.error_file).stat().st_mtime_ns
        for rank, failure in failures.items()
        if rank not in silent
    }
    rank = min(written, key=written.__getitem__)  # `timestamp` is in whole seconds
    return rank, failures[rank]


def _first_line(failure: ProcessFailure) -> str:
    if not isinstance(failure.message, dict):
        if failure.exitcode < 0:
            return f"it was ended by {in_words(-failure.exitcode)}"
        return f"it ended without an exception, exit code {failure.exitcode}"
    lines = [line.strip() for line in str(failure.message["message"]).splitlines()]
    return next((line for line in lines if line), f"exit code {failure.exitcode}")
