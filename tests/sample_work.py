"""A small `Work` for tests of the plan."""

from __future__ import annotations

from typing import Any

from opcd_nemo.plan.work import Layout, Tokens, Work
from tests.tiny import model_config


def layout(**changes: Any) -> Layout:
    values: dict[str, Any] = {
        "tp": 1,
        "pp": 1,
        "dp": 1,
        "cp": 1,
        "sequence_parallel": False,
        "micro_batch_size": 4,
        "distributed_optimizer": True,
        "overlap": False,
        "recompute_mlp": False,
    }
    return Layout(**(values | changes))


def work(**changes: Any) -> Work:
    model = changes.pop("model", model_config("llama"))
    values: dict[str, Any] = {
        "student": model,
        "teacher": model,
        "student_dtype": "bf16",
        "teacher_dtype": "bf16",
        "fp8": False,
        "teacher_update": "never",
        "needs_teacher": True,
        "samples_from_teacher": False,
        "layout": layout(),
        "tokens": Tokens(
            prompt=40,
            shared=10,
            teacher_prompt=140,
            held=100,
            response=20,
            max_new=24,
            retention_max_new=32,
        ),
        "sequences": 8,
        "max_batch_size": 32,
        "packs_weights": False,
        "keeps_turns": False,
        "turns": 1.0,
        "chunk_tokens": 128,
        "top_k": 0,
        "transformer_engine": False,
        "steps": 50,
        "evaluated": 50,
        "retained": 64,
        "validations": 0,
    }
    return Work(**(values | changes))
