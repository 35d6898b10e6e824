"""The experience pipeline: extract, score, select, consolidate, evaluate."""
