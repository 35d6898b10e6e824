"""Compiles every Triton kernel for GPUs that are not here, and reads the machine code's costs."""
