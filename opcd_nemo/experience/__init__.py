"""The experience pipeline: extract, score, select, consolidate, evaluate."""

STAGE_OPTION = "--stage"  # the word with which the pipeline starts its ranks
