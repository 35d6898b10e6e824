"""What the ranks of one layout run; rank 0 writes the results as `<layout>.pt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.export.package import write_package
from opcd_nemo.export.provenance import Provenance
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.losses import TokenTargets
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.model.packing import pack
from opcd_nemo.storage.run_folder import RunFolder
from tests.distributed import cases
from tests.distributed.broken_runs import examine_all
from tests.distributed.cases import LAYOUTS
from tests.distributed.flops import count_all
from tests.distributed.generation import generate_all
from tests.distributed.shards import build, full_tensors, start
from tests.distributed.teachers import follow, stale
from tests.distributed.training import failures, make_loss, move_checkpoint, train


def run_world(world: int, models: Path, results: Path) -> None:
    """Run everything that belongs to a world of this size."""
    for name, layout in LAYOUTS.items():
        if layout.world == world:
            parallel = start(name)
            found = {
                "train": {
                    case: train(parallel, models, cases.TRAIN_CASES[case], steps=cases.STEPS)
                    for case in cases.train_cases(name)
                },
                "failure": failures(parallel, models) if name in cases.FAILING else {},
            }
            if name in cases.UNSPLIT:
                found |= models_alone(parallel, models)
            if name in cases.BF16_LAYOUTS:
                found["bf16"] = train(parallel, models, cases.BF16, steps=1)
            if name == "one":
                found["micro"] = {
                    case: train(parallel, models, cases.MICRO_BATCHES[case], steps=1)
                    for case in cases.MICRO_BATCHES
                }
            if parallel.rank == 0:
                torch.save(found, results / f"{name}.pt")
            parallel.barrier()
    _finish()


def models_alone(parallel: Parallel, models: Path) -> dict[str, Any]:
    """What is asked of models without training them."""
    kept = logits(parallel, models / "qwen3-untied-odd-teacher", cases.KEPT_LAYERS)
    return {
        "logits": {m: logits(parallel, models / m) for m in cases.CONVERTED},
        "kept_logits": kept,
        "gguf_logits": logits(parallel, models / "llama.gguf"),
        "generate": generate_all(parallel, models),
        "head": head_losses(parallel, models) if parallel.pp == 1 else {},
    }


def run_moves(world: int, models: Path, results: Path) -> None:
    """Move checkpoints between the layouts of a world of this size."""
    known = cases.TRAIN_CASES | cases.TEACHER_CASES
    for source, target in cases.CHECKPOINTS[world]:
        found = {
            case: move_checkpoint(models, results, known[case], source, target)
            for case in (*cases.CHECKPOINT_CASES, "ema-bf16")
        }
        packaged = cases.PACKAGED[source, target]
        found["package"] = move_package(models, results, packaged, source, target)
        if int(dist.get_rank()) == 0:
            torch.save(found, results / f"{source}-to-{target}.pt")
    _finish()


def move_package(models: Path, results: Path, name: str, source: str, target: str) -> list[str]:
    """Write a `.nemo` under one layout, load it under another; the tensors that differ.

    Compared, to the bit: the package with the folder that it was made of, and the parameters of the
    other layout with both. In bf16 where the source is tensor-parallel, in fp32 elsewhere.
    """
    dtype = torch.bfloat16 if "tp" in source else torch.float32
    origin = open_model(str(models / name))
    student = LanguageModel(origin.config, start(source), dtype)
    student.load(origin)
    path = results / f"{name}-{source}-{target}.nemo"
    write_package(
        path,
        student,
        config_yaml="{}",
        tokenizer_path=str(models / cases.CHAT),
        provenance=Provenance(context=None, evaluation=None, licence={}),
        run_folder=RunFolder(results),
    )
    package = open_model(str(path))
    other = LanguageModel(package.config, start(target), dtype)
    other.load(package)
    full, _ = full_tensors(other, lambda p: p.data)
    differ = []
    for one in origin.names():
        expected = origin.tensor(one).to(dtype)
        if not (torch.equal(package.tensor(one), expected) and torch.equal(full[one], expected)):
            differ.append(one)
    if package.config != origin.config or package.dtype != dtype:
        differ.append(f"{package.config}, {package.dtype}")
    return differ


def run_teachers(world: int, models: Path, results: Path) -> None:
    """Teachers that move, on the layouts of a world of this size."""
    for name in cases.TEACHER_LAYOUTS:
        if cases.LAYOUTS[name].world == world:
            parallel = start(name)
            found = {
                "followed": {case: follow(parallel, models, case) for case in cases.TEACHER_CASES},
                "stale": {
                    case: stale(parallel, models, case) for case in ("ema", "copied", "live-tied")
                },
            }
            if parallel.rank == 0:
                torch.save(found, results / f"teachers-{name}.pt")
            parallel.barrier()
    _finish()


def run_doctor(world: int, models: Path, results: Path) -> None:
    """Let the doctor see a healthy run and sick ones, at tp 2."""
    found = examine_all(models / cases.CHAT, results)
    if int(dist.get_rank()) == 0:
        torch.save(found, results / f"doctor-tp{world}.pt")
    _finish()


def run_plan(_: int, __: Path, results: Path) -> None:
    """Count the operations of small models in one process."""
    torch.save(count_all(start("one")), results / "plan-one.pt")
    _finish()


def _finish() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def logits(
    parallel: Parallel, path: Path, layers: Sequence[int] | None = None
) -> torch.Tensor | None:
    """Logits at every token of SEQUENCES, from one packed stream."""
    model = build(parallel, path, layers)
    sequences = cases.SEQUENCES
    batch = pack(
        sequences, list(map(len, sequences)), device=parallel.device, multiple=model.stream_multiple
    )
    hidden = model.score([batch], [None])
    with torch.no_grad():
        mine = model.logits(hidden[0]) if hidden else None
    return next(value for value in parallel.gather_objects(mine) if value is not None)


def head_losses(parallel: Parallel, models: Path) -> dict[str, Any]:
    """Loss and gradients of hidden states and head, through the models' own heads."""
    found = {}
    for name in cases.HEAD_MODELS:
        student = build(parallel, models / f"{name}-student")
        teacher = build(parallel, models / f"{name}-teacher")
        draw = torch.Generator().manual_seed(1)
        size = (cases.HEAD_TOKENS,)
        hidden = [
            torch.randn(*size, model.config.hidden_size, generator=draw)
            for model in (student, teacher)
        ]
        targets = torch.randint(student.config.vocab_size, size, generator=draw)
        weight = torch.rand(size, generator=draw)
        for kind, beta, temperature in cases.HEAD_LOSSES:
            loss = make_loss(kind, beta, temperature, cases.HEAD_CHUNK)
            leaf = hidden[0].clone().requires_grad_()
            total, _ = loss(
                student.head(leaf),
                teacher.head(hidden[1]) if kind != "hard" else None,
                TokenTargets(target_ids_N=targets, weight_N=weight),
            )
            student.module.zero_grad()
            total.backward()
            head_gradient = student.head_weight_VH.grad
            assert leaf.grad is not None
            assert head_gradient is not None
            found[name, kind, temperature] = {
                "inputs": (*hidden, targets, weight),
                "loss": total.detach(),
                "hidden": parallel.gather_tp_shards(leaf.grad),
                "head": torch.cat(parallel.gather_tp_shards(head_gradient)),
            }
    return found
