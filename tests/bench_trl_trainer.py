"""TRL's side of `make bench-trl`, run by the Python of TRL's environment.

It imports nothing of this project.

python bench_trl_trainer.py WORK.json PRECISION

Prints a JSON line: versions, CPU-seconds of each step, tokens of each step's answers.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

PRECISIONS = {  # of weights and of products
    "default": {},  # TRL's: fp32 weights, bf16 products
    "bf16": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "fp32": {"bf16": False},
}


class Clock(TrainerCallback):
    """CPU-seconds of this process by step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Note when a step begins."""
        self._begun = time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note what it took."""
        self.seconds.append(time.process_time() - self._begun)


def main(work: dict, precision: str) -> None:
    """Distil the same context into the same model, as our step does, and print what it took."""
    torch.set_num_threads(1)
    settings = SDFTConfig(
        output_dir=work["folder"],
        # exact reverse KL, a sample a prompt: TRL's defaults are another objective
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_topk=None,
        distillation_is_clip=None,
        num_generations=1,
        per_device_train_batch_size=work["prompts_per_step"],
        max_steps=work["steps"],
        max_completion_length=work["max_new_tokens"],
        temperature=work["temperature"],
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=work["clip_grad"],
        gradient_checkpointing=False,  # TRL's default would compute everything twice
        shuffle_dataset=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=work["seed"],
        **PRECISIONS[precision],
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "privileged_context": work["context"],
        }
        for question in work["questions"]
    ]
    clock = Clock()
    trainer = SDFTTrainer(
        model=work["model"], args=settings, train_dataset=Dataset.from_list(rows), callbacks=[clock]
    )
    trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "loss" in log]
    versions = {name: module.__version__ for name, module in MODULES.items()}
    weights = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    print(  # noqa: T201
        json.dumps(
            {
                "versions": versions,
                "precision": f"{weights} weights, {'bf16' if settings.bf16 else weights} products",
                "cpu_s": clock.seconds,
                "tokens": [round(length * work["prompts_per_step"]) for length in lengths],
            }
        )
    )


MODULES = {"trl": trl, "transformers": transformers, "torch": torch}

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
