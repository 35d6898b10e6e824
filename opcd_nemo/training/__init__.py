"""One distillation step and what it needs: inputs, batches, teacher, optimizer."""
