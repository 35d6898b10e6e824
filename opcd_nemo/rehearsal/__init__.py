"""Whole steps of a recipe, rank by rank, on GPUs that do not exist: `opcd rehearse`.

A CPU process plays one rank of the real world. torch's fake tensors stand for those on the GPU:
they have a shape, a type and a device, and no values. What a run needs of CUDA, of the process
group, of Triton and of Transformer Engine's compiled half is stood in for, each by a module of
this package that says so. Models, losses, Megatron and the optimizer are real.
"""
