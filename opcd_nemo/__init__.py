"""On-policy context distillation on NeMo and megatron-core."""
