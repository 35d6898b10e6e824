"""What a stage of the pipeline is, and what every stage works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from omegaconf import DictConfig

from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.distributed.groups import Parallel, init_parallel
from opcd_nemo.distributed.launcher import environment_world
from opcd_nemo.evaluation.evaluator import Evaluator
from opcd_nemo.experience.contents import keep_contents
from opcd_nemo.experience.folder import PipelineFolder
from opcd_nemo.experience.run_configs import experience_context
from opcd_nemo.formats.stored_model import StoredModel
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage.ranks import on_every_rank, on_rank_0
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.training.build import build_engine, build_evaluator
from opcd_nemo.training.inputs import Inputs, open_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Models of a stage that trains nothing, ready to answer on every rank."""

    folder: PipelineFolder
    config: TrainConfig
    inputs: Inputs
    parallel: Parallel
    run_folder: RunFolder

    def engine(self, checkpoint: StoredModel, dtype: str) -> RolloutEngine:
        """An engine of any model with the inputs' vocabulary. Collective over the world."""
        return build_engine(self.config, self.inputs, checkpoint, self.parallel, dtype)

    def teacher(self) -> RolloutEngine:
        """The teacher's engine. Collective over the world."""
        return self.engine(self.inputs.teacher, self.config.teacher.dtype)

    def evaluator(self, items: tuple[str, ...], seed: int) -> Evaluator:
        """An evaluator whose teacher reads these items."""
        inputs = self._with_experience(items) if items else self.inputs
        return build_evaluator(replace(self.config, seed=seed), inputs, self.parallel)

    def without_data_parallel(self) -> Models:
        """The same for what the ranks that share a model do by themselves."""
        alone = replace(self.parallel, dp=1, dp_rank=0, cp=1, cp_rank=0)
        return replace(self, parallel=alone)

    def _with_experience(self, items: tuple[str, ...]) -> Inputs:
        source = experience_context(self.folder, items)
        return self.inputs.with_source(source, self.config.evaluation.num_questions)

    def write(self, name: str, text: str) -> None:
        """Write a file of the round's folder. Collective over the world."""
        on_rank_0(self.parallel, lambda: self.run_folder.write(name, text))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """The round that a stage belongs to; `say` prints on rank 0."""

    folder: PipelineFolder

    def open_models(
        self, raw: DictConfig, check: Callable[[Inputs], None] = lambda _: None
    ) -> Models:
        """Check a configuration and make its models' groups. Collective over the world.

        Raises:
            UserError: a key is wrong, `check` refuses the inputs, or another job has the folder.
        """
        self.folder.check_unchanged()
        config = load_config(raw)
        _, world_size = environment_world()
        inputs = open_inputs(config, world_size)
        check(inputs)
        parallel = init_parallel(config.parallel, config.seed)
        # last: a folder that wrong input has made would refuse the input that is mended
        on_every_rank(parallel, self.folder.open)
        run_folder = RunFolder.hold(self.folder.path, parallel)
        on_rank_0(parallel, lambda: keep_contents(self.folder))
        return Models(
            folder=self.folder,
            config=config,
            inputs=inputs,
            parallel=parallel,
            run_folder=run_folder,
        )


class Stage(Protocol):
    """A part of the pipeline that is done once a round.

    Attributes:
        name: the value of the key `stage`.
        reads: files of the round's folder that must exist before.
        writes: files of the round's folder that exist after; the last is written last. A name with
            `{run}` is a file of every training run, which a launch may do alone.
        needs_ranks: whether ranks run the stage, or the pipeline's process on the first node.
        repeats: whether the stage runs again when its files exist, to do only what they lack.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    needs_ranks: bool
    repeats: bool

    def run(self, context: StageContext) -> None:
        """Do what is not done. Collective over the world where the stage needs ranks."""
