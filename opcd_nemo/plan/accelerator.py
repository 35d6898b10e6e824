"""What a processor can do, and how much of that a run gets: `conf/accelerator/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opcd_nemo.config.doc import doc
from opcd_nemo.config.limits import MOST_RANKS
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.config.train import DTYPES

_PRECISIONS = (*DTYPES, "fp8")
_SHARE: dict[str, Any] = {"above": 0, "maximum": 1}
_SIZE: dict[str, Any] = {"minimum": 1e-6, "maximum": 1e6}  # a toy to a machine of the next decades
_SECONDS: dict[str, Any] = {"minimum": 0, "maximum": 86_400}


@dataclass(kw_only=True)
class Accelerator:
    """One processor of a rank, its links, and explicit shares of their peaks."""

    name: str = doc("as the plan shows it")
    memory_gib: float = doc("memory of a processor, in GiB", **_SIZE)
    memory_is_shared: bool = doc("all ranks of a machine share that memory")
    tflops: dict[str, float] = doc("peak by precision, without sparsity", **_SIZE)
    memory_gb_per_s: float = doc("bandwidth of the memory, in GB/s", **_SIZE)
    link_gb_per_s: float = doc("bandwidth between ranks of a machine, one direction", **_SIZE)
    network_gb_per_s: float = doc("bandwidth between machines, of a rank", **_SIZE)
    collective_latency_s: float = doc("seconds of a small all-reduce in a machine", **_SECONDS)
    ranks_per_node: int = doc("ranks of a machine", minimum=1, maximum=MOST_RANKS)
    training_share: float = doc("share of the peak in forward and backward passes", **_SHARE)
    prefill_share: float = doc("share of the peak in a forward pass alone", **_SHARE)
    decode_share: float = doc("share of the peak where many sequences are decoded", **_SHARE)
    bandwidth_share: float = doc("share of the memory's bandwidth", **_SHARE)
    network_share: float = doc("share of the bandwidth between ranks and machines", **_SHARE)
    overlap_share: float = doc("share of an exchange that computation hides", minimum=0, maximum=1)
    layer_latency_s: float = doc("least seconds of a layer for one decoded token", **_SECONDS)
    engine_bandwidth_share: float = doc("bandwidth_share of a vLLM server that decodes", **_SHARE)
    engine_step_s: float = doc("least seconds of a server for a token of each answer", **_SECONDS)
    engine_push_gb_per_s: float = doc(
        "weights that a process copies between a GPU and a file in memory, in GB/s", **_SIZE
    )
    engine_base_gib: float = doc(
        "memory of a server without a model, in GiB", minimum=0, maximum=1e6
    )
    engine_asleep_gib: float = doc(
        "memory of a GPU that a sleeping server keeps, in GiB", minimum=0, maximum=1e6
    )
    fused_attention: bool = doc("no attention scores are stored")
    usable_share: float = doc("share of the memory that can be used", **_SHARE)
    base_gib: float = doc("memory of a rank without a model, in GiB", minimum=0, maximum=1e6)
    launcher_gib: float = doc(
        "memory of the process that starts the ranks, in GiB", minimum=0, maximum=1e6
    )
    transient_share: float = doc("memory taken for what is asked for, as a factor", **_SIZE)
    start_s: float = doc("seconds of imports and loading", **_SECONDS)

    def check(self, prefix: str) -> None:
        """Refuse a precision that no run has.

        Raises:
            UserError: `prefix` stands before the key.
        """
        if unknown := [name for name in self.tflops if name not in _PRECISIONS]:
            raise unknown_name(f"{prefix}tflops.{unknown[0]}", _PRECISIONS, what="precision")

    def link(self, span: int) -> float:
        """Bytes a second of a group of so many neighbouring ranks, in one direction."""
        inside = span <= self.ranks_per_node
        return 1e9 * self.network_share * (self.link_gb_per_s if inside else self.network_gb_per_s)

    def flops(self, dtype: str, share: float) -> float:
        """Operations a second at a share of the peak."""
        return 1e12 * self.tflops[dtype] * share
