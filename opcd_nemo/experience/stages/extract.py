"""Extract: a model plays without context and writes what it learnt."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

from opcd_nemo.experience.candidates import candidates
from opcd_nemo.experience.config import ExtractionConfig
from opcd_nemo.experience.extraction import Extraction, Sampler, check_extraction
from opcd_nemo.experience.folder import CANDIDATES, EXTRACTION, TURNS
from opcd_nemo.experience.run_configs import stage_config
from opcd_nemo.experience.scoring import check_scoring
from opcd_nemo.experience.stages.context import Models, StageContext
from opcd_nemo.training.inputs import Inputs

logger = logging.getLogger(__name__)


class Extract:
    """Writes the candidates, and the prompts of all turns for replay."""

    name = "extract"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = (TURNS, CANDIDATES)
    needs_ranks = True
    repeats = False

    def run(self, context: StageContext) -> None:
        """Do every wave that is not done, then write the candidates. Collective."""
        raw, experience = stage_config(context.folder), context.folder.settings.experience
        settings = experience.extraction
        if settings.model is not None:
            raw.student.path, raw.student.keep_layers, raw.teacher.path = settings.model, None, None

        def check(inputs: Inputs) -> None:
            check_extraction(settings, inputs.task, inputs.conversation, inputs.conversation)
            check_scoring(experience.scoring, inputs.task)

        models = context.open_models(raw, check)
        records = _extraction(models, settings).run()
        encode = models.inputs.tokenizer.encode
        found = candidates(records, settings.cap_tokens, lambda text: len(encode(text)))
        turns = [
            {"uid": f"{record['chain']}/{record['step']}/{record['uid']}/{number}", "text": text}
            for record in records
            for number, text in enumerate(record["turns"])
        ]
        models.write(TURNS, "".join(f"{json.dumps(turn)}\n" for turn in turns))
        models.write(CANDIDATES, json.dumps([candidate.record() for candidate in found]))
        logger.info("extraction: %s candidates from %s extractions", len(found), len(records))


def _extraction(models: Models, settings: ExtractionConfig) -> Extraction:
    engine, conversation = models.teacher(), models.inputs.conversation
    play = replace(models.config.rollout.sampling, max_new_tokens=settings.problem_max_new_tokens)
    return Extraction(
        models.run_folder,
        EXTRACTION,
        settings,
        models.inputs.task,
        player=Sampler(engine=engine, conversation=conversation, sampling=play),
        writer=Sampler(engine=engine, conversation=conversation, sampling=settings.sampling),
        parallel=models.parallel,
        seed=models.config.seed,
    )
