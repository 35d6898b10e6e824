"""What the ranks of one layout run; rank 0 writes the results as `<layout>.pt`.

Sharded tensors are joined to full ones under their Hugging Face names, so that every layout gives
the same dictionaries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from opcd_nemo import checkpoint
from opcd_nemo.batching import pack
from opcd_nemo.engines.megatron import MegatronEngine
from opcd_nemo.hf import hf_tensors, keep_layers, megatron_shard, open_checkpoint
from opcd_nemo.language_model import LanguageModel
from opcd_nemo.losses import DivergenceLoss, HardLabelLoss, Loss
from opcd_nemo.metrics import Stats
from opcd_nemo.model_config import tensor_shapes
from opcd_nemo.optim import NonFiniteError, StudentOptimizer
from opcd_nemo.parallel import Parallel, init_parallel
from opcd_nemo.rollout import SamplingParams
from opcd_nemo.step import Phase, Run, distill_step
from opcd_nemo.teacher import FrozenTeacher
from opcd_nemo.types import Prompt, Sample
from tests.distributed import cases
from tests.distributed.cases import LAYOUTS, TrainCase

Tensors = dict[str, torch.Tensor]


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
                "logits": {m: logits(parallel, models / m) for m in cases.CONVERTED},
                "kept_logits": logits(
                    parallel, models / "qwen3-untied-odd-teacher", cases.KEPT_LAYERS
                ),
                "gguf_logits": logits(parallel, models / "llama.gguf"),
                "generate": generate_all(parallel, models),
                "head": head_losses(parallel, models) if parallel.pp == 1 else {},
                "failure": failures(parallel, models) if name in cases.FAILING else {},
            }
            if name == "one":
                found["micro"] = {
                    case: train(parallel, models, cases.MICRO_BATCHES[case], steps=1)
                    for case in cases.MICRO_BATCHES
                }
            if parallel.rank == 0:
                torch.save(found, results / f"{name}.pt")
            parallel.barrier()
    _finish()


def run_moves(world: int, models: Path, results: Path) -> None:
    """Move checkpoints between the layouts of a world of this size."""
    for source, target in cases.CHECKPOINTS[world]:
        found = {
            case: move_checkpoint(models, results, cases.TRAIN_CASES[case], source, target)
            for case in cases.CHECKPOINT_CASES
        }
        if int(dist.get_rank()) == 0:
            torch.save(found, results / f"{source}-to-{target}.pt")
    _finish()


def _finish() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def start(layout_name: str) -> Parallel:
    """Create the groups of a layout."""
    layout = LAYOUTS[layout_name]
    settings = SimpleNamespace(
        device="cpu",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        threads_per_rank=1,
        timeout_s=120.0,
    )
    return init_parallel(settings, seed=0)


def build(parallel: Parallel, path: Path, layers: Sequence[int] | None = None) -> LanguageModel:
    """A model of a folder, in fp32."""
    source = open_checkpoint(str(path))
    config = source.config if layers is None else keep_layers(source.config, layers)
    model = LanguageModel(config, parallel, torch.float32)
    model.load(source, layers)
    return model


# ---- joining


def full_tensors(
    model: LanguageModel, read: Callable[[torch.nn.Parameter], torch.Tensor]
) -> tuple[Tensors, list[str]]:
    """Full tensors of all parameters, on every rank, and the names whose copies differ.

    Copies are: replicated parameters over tp, everything over dp, a tied head and its embedding.
    """
    parallel, mine, unequal = model.parallel, {}, []
    tied_head = None
    for name, parameter in model.module.named_parameters():
        shards = parallel.gather_tp_shards(read(parameter))
        if "norm" in name and any(not torch.equal(shard, shards[0]) for shard in shards):
            unequal.append(f"{name} over tp")
        if name == "output_layer.weight" and model.config.tied_embeddings:
            tied_head = torch.cat(shards)[: model.config.vocab_size]
        mine |= hf_tensors(
            shards, model.config, name, layer=model.global_layer(name), spec=parallel.layer_spec
        )
    joined: Tensors = {}
    for part, head in parallel.gather_objects((mine, tied_head)):
        for name, tensor in part.items():
            if not torch.equal(joined.setdefault(name, tensor), tensor):
                unequal.append(f"{name} over ranks")
        if head is not None and not torch.equal(head, joined["model.embed_tokens.weight"]):
            unequal.append("tied head")
    return joined, unequal


def gather_gradient_shards(optimizer: StudentOptimizer, parallel: Parallel) -> None:
    """Fill the buffers that the DistributedOptimizer reduce-scattered over dp."""
    for buffer in optimizer.ddp.buffers:
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(parallel.dp)[parallel.dp_rank].clone()
            parts = [torch.empty_like(mine) for _ in range(parallel.dp)]
            dist.all_gather(parts, mine, group=parallel.dp_group)
            bucket.grad_data.copy_(torch.cat(parts))


def largest_padding(
    model: LanguageModel, read: Callable[[torch.nn.Parameter], torch.Tensor | None]
) -> float:
    """Largest absolute value at the padding of this rank's parameters."""
    shapes = tensor_shapes(model.config)
    worst = 0.0
    for name, parameter in model.module.named_parameters():
        real = megatron_shard(
            lambda hf_name: torch.ones(shapes[hf_name]),
            model.config,
            name,
            layer=model.global_layer(name),
            tp_size=model.parallel.tp,
            tp_rank=model.parallel.tp_rank,
            spec=model.parallel.layer_spec,
        )
        values = read(parameter)
        if values is not None and bool((real == 0).any()):
            worst = max(worst, values[real == 0].abs().max().item())
    return worst


# ---- training


class Recorder(StudentOptimizer):
    """Megatron's optimizer, which keeps the first step's full gradients."""

    gradients: Tensors | None = None
    unequal: list[str]
    padding: float
    model: LanguageModel

    def step(self) -> Stats:
        """Record, then clip and update."""
        if self.gradients is None:
            if self.ddp.ddp_config.use_distributed_optimizer:
                gather_gradient_shards(self, self.model.parallel)
            self.gradients, self.unequal = full_tensors(self.model, lambda p: p.main_grad)
            self.padding = largest_padding(self.model, lambda p: p.main_grad)
        return super().step()


@dataclass
class FixedEpisode:
    """One prompt, answered once."""

    uid: str
    prompt: tuple[int, ...]
    done: bool = False

    def reply(self, _: str) -> None:
        """End the episode."""
        self.done = True


class FixedTask:
    """The prompts of `cases.training_pairs`."""

    def episodes(self, _: str, step: int, n: int) -> list[FixedEpisode]:
        """The first n."""
        return [
            FixedEpisode(f"{step}/{place}", prompt)
            for place, (prompt, _) in enumerate(cases.training_pairs(step)[:n])
        ]

    def anchors(self, step: int, n: int) -> list[FixedEpisode]:
        """The last n."""
        pairs = cases.training_pairs(step)
        return [FixedEpisode(f"{step}/{-place}", pairs[-place][0]) for place in range(n, 0, -1)]


class FixedConversation:
    """The teacher reads a context before the student's prompt."""

    tokenizer = SimpleNamespace(decode=lambda _: "")

    def prompts(
        self, episode: FixedEpisode, *, with_context: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Student's and teacher's."""
        context = cases.teacher_context(episode.prompt) if with_context else ()
        return episode.prompt, (*context, *episode.prompt)

    def check_fits(self, *_: object) -> None:
        """Everything fits."""


@dataclass
class FixedEngine:
    """Answers with the responses of `cases.training_pairs`."""

    weights_version: int = 0

    def load_weights(self, version: int) -> None:
        """Remember the version."""
        self.weights_version = version

    def release_weights(self) -> None:
        """Nothing is held."""

    def generate(self, prompts: Sequence[Prompt], *_: object, step: int, **__: object) -> Any:
        """The response of each prompt's place."""
        pairs = cases.training_pairs(step)
        assert all(pairs[prompt.index][0] == prompt.token_ids for prompt in prompts)
        answers = [pairs[prompt.index][1] for prompt in prompts]
        return [
            Sample(response_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="length")
            for ids in answers
        ]


def make_loss(kind: str, beta: float = 0.5, temperature: float = 1.0, chunk: int = 5) -> Loss:
    """The loss of a case."""
    if kind == "hard":
        return HardLabelLoss(temperature, chunk)
    assert kind in ("reverse_kl", "forward_kl", "jsd")
    return DivergenceLoss(kind, beta, temperature, chunk)


def build_run(parallel: Parallel, models: Path, case: TrainCase) -> Run:
    """Student, teacher and optimizer of a case, around fixed rollouts."""
    student = build(parallel, models / case.student)
    settings = SimpleNamespace(
        lr=case.adam.lr,
        min_lr=0.0,
        schedule="constant",
        warmup_steps=0,
        betas=list(cases.BETAS),
        eps=case.adam.eps,
        weight_decay=case.adam.weight_decay,
        clip_grad=case.adam.clip,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
    )
    optimizer = Recorder(student, settings, max_steps=cases.STEPS)
    optimizer.model = student
    engine: Any = FixedEngine()
    if case.on_policy:
        engine = MegatronEngine(student, (2, 3, 4), max_batch_size=32, pack=True)
    phase = Phase(sampler="student", loss=make_loss(case.loss))
    fixed: Any = (FixedTask(), FixedConversation())
    return Run(
        parallel=parallel,
        task=fixed[0],
        conversation=fixed[1],
        student=student,
        teacher=FrozenTeacher(build(parallel, models / case.teacher), cases.CONTEXT),
        engines={"student": engine},
        optimizer=optimizer,
        sampling=SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=5),
        phase=phase,
        warmup=phase,
        warmup_steps=0,
        seed=0,
        prompts_per_step=cases.NUM_PROMPTS,
        anchors_per_step=cases.NUM_ANCHORS,
        micro_batch_size=case.micro_batch_size,
        aggregation="token_mean" if case.token_mean else "sequence_mean",
    )


def train(parallel: Parallel, models: Path, case: TrainCase, steps: int) -> dict[str, Any]:
    """Distil for some steps; losses, norms, first gradients and last parameters."""
    run = build_run(parallel, models, case)
    teacher = run.teacher.model.module
    before = [parameter.clone() for parameter in teacher.parameters()]
    stats = [distill_step(run, step) for step in range(steps)]
    parameters, unequal = full_tensors(run.student, lambda p: p.data)
    recorder: Any = run.optimizer
    return {
        "stats": [s.means() for s in stats],
        "gradients": recorder.gradients,
        "parameters": parameters,
        "unequal": recorder.unequal + unequal,
        "padding": _worst_padding(run),
        "teacher_unchanged": all(map(torch.equal, before, teacher.parameters())),
        "teacher_without_gradient": all(
            p.grad is None and not p.requires_grad and not hasattr(p, "main_grad")
            for p in teacher.parameters()
        ),
    }


def _worst_padding(run: Run) -> dict[str, float]:
    """Largest padded weight, gradient and Adam moment over all ranks."""
    recorder: Any = run.optimizer
    worst = {
        "weight": largest_padding(run.student, lambda p: p.data),
        "gradient": recorder.padding,
    }
    adam = recorder.optimizer.chained_optimizers[0].optimizer.state
    for key in ("exp_avg", "exp_avg_sq"):
        worst[key] = largest_padding(run.student, lambda p, key=key: adam.get(p, {}).get(key))
    parts = run.parallel.gather_objects(worst)
    return {key: max(part[key] for part in parts) for key in worst}


# ---- logits and generation


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


GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=cases.NEW_TOKENS)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, max_new_tokens=cases.NEW_TOKENS)


@dataclass
class Generator:
    """A model that continues this rank's share of prompts, in several ways."""

    model: LanguageModel
    eos: Sequence[int]
    rows: list[int] = field(default_factory=list)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams = GREEDY,
        *,
        pack: bool = True,
        width: int = 32,
        prefix: Sequence[int] = (),
        parts: int = 1,
    ) -> list[Sample]:
        """All prompts' samples, in order; the share is generated in `parts` calls."""
        parallel = self.model.parallel
        engine = MegatronEngine(self.model, self.eos, max_batch_size=width, pack=pack)
        engine.load_weights(0)
        mine = [prompts[place] for place in parallel.share(len(prompts))]
        samples: list[Sample] = []
        for part in range(parts):
            chosen = mine[len(mine) * part // parts : len(mine) * (part + 1) // parts]
            samples += engine.generate(chosen, sampling, seed=3, step=5, prefix_ids=prefix)
        engine.release_weights()
        return parallel.gather_over_dp(samples)


def generate_all(parallel: Parallel, models: Path) -> dict[str, Any]:
    """Samples of every variant, by name; wide worlds leave out what narrow ones show."""
    ends = json.loads((models / "ends.json").read_text())
    ragged, led = (cases.generation_prompts(led=led) for led in (False, True))
    found: dict[str, Any] = {}
    for name in cases.GENERATORS:
        generator = Generator(build(parallel, models / name), ends[name])
        found[f"{name}/packed"] = generator(ragged)
        if parallel.world_size <= 2 and not parallel.sequence_parallel:
            found[f"{name}/plain"] = generator(ragged, pack=False)
    generator = Generator(build(parallel, models / cases.SAMPLED_FROM), ends[cases.SAMPLED_FROM])
    found |= {
        "led, held": generator(led, prefix=cases.PREFIX),
        "drawn": generator(led, DRAWN),
        "drawn, split": generator(led, DRAWN, parts=3),
        "decoded rows": _decoded_rows(generator, ragged),
    }
    if parallel.world_size <= 2:
        found |= _more_variants(generator, ragged, led)
    generator = Generator(build(parallel, models / cases.PADDING_WINS), ())
    found["padding, greedy"] = generator(ragged[:8])
    hot = replace(DRAWN, temperature=5.0, top_p=1.0, top_k=0)
    found["padding, hot"] = generator(ragged[:8], hot)
    return found


def _more_variants(
    generator: Generator, ragged: list[Prompt], led: list[Prompt]
) -> dict[str, list[Sample]]:
    prefix, in_stream = cases.PREFIX, cases.IN_STREAM
    half = [p if p.index % 2 else replace(p, token_ids=p.token_ids[1:]) for p in led]
    return {
        "narrow": generator(ragged, width=5),
        "led": generator(led),
        "led, held, plain": generator(led, prefix=prefix, pack=False, width=7),
        "led, all held": generator(led, prefix=(*prefix, *in_stream)),
        "half led": generator(half),
        "half led, held": generator(half, prefix=prefix),
        "drawn, plain": generator(led, DRAWN, pack=False),
        "drawn, narrow": generator(led, DRAWN, width=5),
        "drawn, held": generator(led, DRAWN, prefix=prefix),
        "drawn, reversed": generator(led[::-1], DRAWN)[::-1],
    }


def _decoded_rows(generator: Generator, prompts: Sequence[Prompt]) -> list[int]:
    """Stream length of every forward of this rank, from prefill to the last step."""
    model, lengths = generator.model, []
    forward = model.stage_forward

    def counting(stream: Any) -> torch.Tensor | None:
        lengths.append(len(stream.token_ids_T))
        return forward(stream)

    model.stage_forward = counting  # type: ignore[method-assign]
    generator(prompts)
    del model.stage_forward
    return lengths


# ---- losses


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
                target_ids_N=targets,
                weight_N=weight,
                parallel=parallel,
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


# ---- checkpoints and failures


def move_checkpoint(
    models: Path, results: Path, case: TrainCase, source: str, target: str
) -> dict[str, Any]:
    """Two steps under one layout, save, load under another, and the third step under both."""
    path = results / f"{source}-{target}-{case.student}"
    parallel = start(source)
    run = build_run(parallel, models, case)
    for step in range(2):
        distill_step(run, step)
    checkpoint.save(
        path, {"optimizer_states": [], "epoch": 7}, run.student, run.optimizer, parallel
    )
    saved, _ = full_tensors(run.student, lambda p: p.data)
    expected = distill_step(run, 2).means()
    continued, _ = full_tensors(run.student, lambda p: p.data)

    run = build_run(start(target), models, case)
    common = checkpoint.load(path, run.student, run.optimizer)
    loaded, _ = full_tensors(run.student, lambda p: p.data)
    stats = distill_step(run, 2).means()
    resumed, unequal = full_tensors(run.student, lambda p: p.data)
    return {
        "saved": saved,
        "loaded": loaded,
        "continued": continued,
        "resumed": resumed,
        "stats": (expected, stats),
        "epoch": common["epoch"],
        "unequal": unequal,
    }


def failures(parallel: Parallel, models: Path) -> dict[str, list[dict[str, Any]]]:
    """What every rank reports when one rank meets a NaN."""

    def poison_weight(parameter: torch.nn.Parameter) -> None:
        parameter.data.view(-1)[0] = math.nan

    def poison_gradient(parameter: torch.nn.Parameter) -> None:
        parameter.register_hook(lambda gradient: gradient * math.nan)

    found = {}
    for name, poison in {"weight": poison_weight, "gradient": poison_gradient}.items():
        for case in ("llama-untied", "llama-untied-distributed"):
            run = build_run(parallel, models, cases.TRAIN_CASES[case])
            distill_step(run, 0)
            if parallel.rank == parallel.world_size - 1:
                poison(run.student.module.decoder.layers[-1].mlp.linear_fc2.weight)
            before = [p.detach().clone() for p in run.student.module.parameters()]
            raised = "nothing"
            try:
                distill_step(run, 1)
            except NonFiniteError as error:
                raised = str(error)
            found[f"{name}, {case}"] = parallel.gather_objects(
                {
                    "raised": raised,
                    "unchanged": all(
                        torch.equal(a.nan_to_num(1.5), p.detach().nan_to_num(1.5))
                        for a, p in zip(before, run.student.module.parameters(), strict=True)
                    ),
                }
            )
    return found
