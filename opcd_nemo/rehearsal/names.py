"""What a rank's process and the one that compares both know, without importing torch."""

BEGIN, END = "coalesced: begin", "coalesced: end"  # sends and receives between them go together
MICRO_BATCHES = 2  # a step
SHARED = 16  # tokens that all prompts start with, as those of a chat template
