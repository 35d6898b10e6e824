"""What a run takes: `python recipes/plan.py <as recipes/train.py> accelerator=h100`."""

from opcd_nemo.launch.ranks import Main, run_alone


def load_main() -> Main:
    """Import the arithmetic."""
    from opcd_nemo.plan.planning import plan

    return plan


if __name__ == "__main__":
    run_alone(load_main, "plan")
