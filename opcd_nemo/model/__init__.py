"""The language model: Megatron layers, packed attention, decoding."""
