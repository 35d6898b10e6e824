"""The stages of the experience pipeline, in their order."""

from opcd_nemo.experience.stages.consolidate import Consolidate
from opcd_nemo.experience.stages.context import Stage
from opcd_nemo.experience.stages.evaluate import Evaluate
from opcd_nemo.experience.stages.extract import Extract
from opcd_nemo.experience.stages.score import Score
from opcd_nemo.experience.stages.select import Select

STAGES: tuple[Stage, ...] = (Extract(), Score(), Select(), Consolidate(), Evaluate())
