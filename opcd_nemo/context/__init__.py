"""What the teacher reads: sources, items of experience, and their registry.

Configurations name the sources by this package: `_target_: opcd_nemo.context.FewShotContext`.
"""

from opcd_nemo.context.sources import (
    ExperienceContext,
    ExperiencePool,
    FewShotContext,
    FixedContext,
    NoContext,
)

__all__ = [
    "ExperienceContext",
    "ExperiencePool",
    "FewShotContext",
    "FixedContext",
    "NoContext",
]
