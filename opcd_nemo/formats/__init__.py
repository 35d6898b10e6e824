"""Models and tokenizers on disk: Hugging Face, GGUF, `.nemo`, checkpoints."""
