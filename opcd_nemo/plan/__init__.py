"""What a training run takes on a named accelerator, by arithmetic: memory, time, GPU-hours.

docs/plan.md has every formula with its source and what was measured against it.
"""
