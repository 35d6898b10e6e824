"""A model's weights as files for a vLLM server: Hugging Face tensors, unpadded, a bucket a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opcd_nemo.errors import EngineError, UserError
from opcd_nemo.formats.shape import tensor_shapes
from opcd_nemo.formats.sharding import hf_tensors

if TYPE_CHECKING:  # megatron-core: what checks, plans or reports a run does without
    from opcd_nemo.model.language_model import LanguageModel

BUCKET_BYTES = 1 << 30  # a rank holds so much beside its shard, or a single tensor
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GIB = 1 << 30


def names_of(model: LanguageModel, *, with_head: bool) -> set[str]:
    """The tensors that a server of this model must be given."""
    return set(tensor_shapes(model.config)) | ({_HEAD} if with_head else set())


def check_room(folder: Path, model: LanguageModel, *, copies: int, with_head: bool) -> None:
    """Refuse a folder that has no room for the weights.

    Args:
        folder: where they are written.
        model: the model that has the weights.
        copies: servers of this machine that are given a copy each.
        with_head: whether a tied head is written as a separate tensor.

    Raises:
        UserError: with the bytes needed.
    """
    shapes = tensor_shapes(model.config)
    if with_head:
        shapes[_HEAD] = shapes[_EMBEDDING]
    needed = copies * model.dtype.itemsize * sum(map(prod, shapes.values()))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            "engine.folder",
            folder,
            f"a folder with {needed / _GIB:.2f} GiB free, in memory if it can be",
            problem=f"has {free / _GIB:.2f} GiB free, the weights take {needed} bytes",
        )


@torch.no_grad()
def write_stage(model: LanguageModel, folder: Path, *, writes: bool, with_head: bool) -> list[str]:
    """Write this stage's tensors into an existing folder. Collective over tp.

    Args:
        model: whose present weights are written.
        folder: of a single version of the weights.
        writes: whether this is the rank of its stage that writes; the others only take part.
        with_head: write a tied head as a separate tensor, as the server has it.

    Returns:
        The names that were written.

    Raises:
        EngineError: the disk refuses; every other rank of tp has done its part by then.
    """
    bucket: dict[str, torch.Tensor] = {}
    names: list[str] = []
    failed: Exception | None = None

    def flush() -> None:
        nonlocal failed
        bad = next((name for name, each in bucket.items() if not each.isfinite().all()), None)
        if bad is not None and failed is None:  # a server would say token 0 for ever
            failed = ValueError(f"{bad} has values that are infinite or no numbers")
        if bucket and failed is None:
            file = folder / f"stage={model.parallel.pp_rank}.first={len(names)}.safetensors"
            try:
                save_file(bucket, file)
                names.extend(bucket)
            except (OSError, SafetensorError) as error:  # the others of tp wait in a gather
                failed = error
        bucket.clear()

    for name, tensor in stage_tensors(model, writes=writes, with_head=with_head):
        if sum(each.nbytes for each in bucket.values()) + tensor.nbytes > BUCKET_BYTES:
            flush()
        bucket[name] = tensor
    flush()
    if failed is not None:
        raise EngineError(f"engine.folder={folder}: the weights cannot be written: {failed}")
    return names


def stage_tensors(
    model: LanguageModel, *, writes: bool, with_head: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """What `write_stage` writes, in the memory of the machine; nothing where it does not.

    Collective over tp: of the device's memory a parameter at a time is taken, gathered.
    """
    tied = model.config.tied_embeddings
    for name, parameter in model.module.named_parameters():
        if tied and name == "output_layer.weight":
            continue  # the last stage's copy of the embedding
        shards = model.parallel.gather_tp_shards(parameter.detach())
        if not writes:
            continue
        tensors = hf_tensors(
            [shard.cpu() for shard in shards],
            model.config,
            name,
            layer=model.global_layer(name),
            spec=model.parallel.layer_spec,
        )
        yield from tensors.items()
        if with_head and tied and _EMBEDDING in tensors:
            yield _HEAD, tensors[_EMBEDDING].clone()
