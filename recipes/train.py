"""Distil a context into a model: `python recipes/train.py recipe=demo_brevity parallel=dp2`."""

from opcd_nemo.launch.ranks import Main, run_recipe


def load_main() -> Main:
    """Import the training loop, which needs seconds, only in the ranks."""
    from opcd_nemo.trainer.run import train

    return train


if __name__ == "__main__":
    run_recipe(load_main, "train")
