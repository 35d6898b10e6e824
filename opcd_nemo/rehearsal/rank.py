"""Ranks of a rehearsal: `python -m opcd_nemo.rehearsal.rank` reads their tasks from stdin.

The first line of this module that imports torch comes after the device's guard is registered.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from opcd_nemo.rehearsal import devices

_SHORT = 256  # tokens of an answer

if TYPE_CHECKING:
    from opcd_nemo.config.train import TrainConfig
    from opcd_nemo.rehearsal.recorder import Recorder
    from opcd_nemo.rehearsal.tensors import Answers
    from opcd_nemo.training.step import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a rank is told, as JSON.

    `words` compose the run's configuration. `layers` are those of each model; None: all.
    `lengths` are those of `play.Lengths`, `tokens` those that are sampled.
    """

    rank: int
    world_size: int
    words: list[str]
    layers: int | None
    lengths: dict[str, int]
    tokens: int
    gpu: str
    memory_gib: float
    per_node: int
    with_te: bool


def main() -> int:
    """Play a rank for each line of stdin, and write what it did to stdout as a line of JSON.

    Each rank is a fork of this process, which has everything imported. Of a rank that fails the
    line is `{"ended": its exit code}`, and 1 is returned at the end.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)  # advice to callers of Megatron
    sys.path.append(str(Path.cwd()))  # a task or loss of the user's own
    shown, sys.stdout = sys.stdout, sys.stderr  # libraries print
    devices.load_guard()
    first, failed = sys.stdin.readline(), False
    if not first:
        return 0  # no rank is played
    stand_ins = _stand_ins(Task(**json.loads(first)))
    for line in chain([first], sys.stdin):
        if not (pid := os.fork()):
            _play_and_end(Task(**json.loads(line)), *stand_ins, shown)
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            failed = True
            shown.write(f"{json.dumps({'ended': code})}\n")
            shown.flush()
    return int(failed)


def _play_and_end(task: Task, recorder: Recorder, answers: Answers, shown: TextIO) -> NoReturn:
    try:
        shown.write(f"{json.dumps(_rehearse(task, recorder, answers))}\n")
        shown.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _stand_ins(task: Task) -> tuple[Recorder, Answers]:
    """Put every stand-in in place for ranks of this GPU, and import what ranks need."""
    from opcd_nemo.rehearsal import groups, tensors, transformer_engine, triton
    from opcd_nemo.rehearsal.recorder import Recorder

    recorder, answers = Recorder(), tensors.Answers()
    devices.answer_as_gpus(task.gpu, task.memory_gib, task.per_node)
    tensors.install(recorder, answers)
    groups.install(recorder)
    if task.with_te:
        transformer_engine.install(recorder)
    import opcd_nemo.model.language_model  # megatron-core, which has kernels of its own

    triton.install(recorder)
    import opcd_nemo.checkpoint.sharded_state
    import opcd_nemo.rehearsal.play
    import opcd_nemo.rehearsal.shapes  # noqa: F401

    return recorder, answers


def _rehearse(task: Task, recorder: Recorder, answers: Answers) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from opcd_nemo.rehearsal.groups import start_world
    from opcd_nemo.rehearsal.shapes import read_rehearsal

    started = time.perf_counter()
    start_world(task.rank, task.world_size, task.per_node)
    config, _, _ = read_rehearsal(task.words)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        facts = _play(task, config, recorder, answers)
    return {
        **facts,
        **recorder.result(),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
    }


def _play(task: Task, config: TrainConfig, recorder: Recorder, answers: Answers) -> dict[str, Any]:
    """Build, train, sample, train, save, resume, and train a third step."""
    from opcd_nemo.distributed.groups import init_parallel
    from opcd_nemo.rehearsal import play
    from opcd_nemo.rehearsal.shapes import shapes_of
    from opcd_nemo.rollout.engine import ThreadedEngine
    from opcd_nemo.training.step import learn

    lengths = play.Lengths(**task.lengths)
    parallel = init_parallel(config.parallel, config.seed)
    run = play.open_run(config, shapes_of(config, task.layers), parallel, lengths)
    run = replace(run, watch=recorder)  # type: ignore[arg-type]
    # the first step grows what is kept from step to step, the second is the fullest: what else is
    # trained is less, for answers cost the most time here
    learn(run, play.rollouts(run, lengths, 1), 0)
    with recorder.phase("rollout"):
        if isinstance(run.engines["student"], ThreadedEngine):
            play.push(run)
        else:
            rows = play.rows_together(run, config.engine["max_batch_size"])
            answers.end_after(task.tokens * min(parallel.pp, rows), play.EOS)
            play.sample(run, lengths, rows)
            play.decode_the_last_token(run, lengths, rows)
    learn(run, play.rollouts(run, lengths), 1)
    held = _save_and_resume(run, recorder)
    short = replace(lengths, response=min(lengths.response, _SHORT))
    learn(run, play.rollouts(run, short), 2)
    return {
        "rank": parallel.rank,
        "place": {
            axis: (getattr(parallel, f"{axis}_rank"), getattr(parallel, axis))
            for axis in ("tp", "pp", "dp", "cp")
        },
        "layer_spec": parallel.layer_spec,
        "held_bytes": held,
    }


def _save_and_resume(run: Run, recorder: Recorder) -> dict[str, int]:
    """Gather what a checkpoint holds and fill the optimizer with it, without files.

    Returns what the rank holds before and after.
    """
    from opcd_nemo.checkpoint import sharded_state

    optimizer, parallel, before = run.optimizer, run.parallel, recorder.held
    with recorder.phase("save"):
        weights = sharded_state.sharded_weights(run.student)
        sharded_state.optimizer_to_save(weights, optimizer, parallel)
        sharded_state.teacher_state(run.teacher)
    with recorder.phase("resume"):
        sharded_state.prepare_loading(optimizer.optimizer)
        weights = sharded_state.sharded_weights(run.student)
        wanted = sharded_state.optimizer_to_load(weights, optimizer)
        sharded_state.load_optimizer(optimizer.optimizer, _as_loaded(wanted["optimizer"]))
        optimizer.scheduler.load_state_dict(wanted["scheduler"])
    del weights, wanted
    return {"before resume": before, "after resume": recorder.held}


def _as_loaded(node: Any) -> Any:
    """What `dist_checkpointing.load` would put in place of the sharded tensors of a state."""
    import torch

    if isinstance(node, dict):
        return {key: _as_loaded(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_as_loaded(value) for value in node]
    if not hasattr(node, "replica_id"):
        return node
    data = getattr(node, "data", None)
    if not hasattr(node, "local_shape") and not isinstance(data, torch.Tensor):
        return data  # an object
    if data is not None:
        return torch.empty_like(data)
    return torch.empty(node.local_shape, dtype=node.dtype, device="cuda")


if __name__ == "__main__":
    sys.exit(main())
