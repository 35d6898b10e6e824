"""The same runs and models as the command `opcd`, as functions for scripts and notebooks."""

from opcd_nemo.api.distilling import distill
from opcd_nemo.api.finished import FinishedRun
from opcd_nemo.api.model import ChatModel, load_model

__all__ = ["ChatModel", "FinishedRun", "distill", "load_model"]
