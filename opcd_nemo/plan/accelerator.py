"""What a processor can do, and how much of that a run gets: `conf/accelerator/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opcd_nemo.config.doc import doc

_SHARE: dict[str, Any] = {"above": 0, "maximum": 1}


@dataclass(kw_only=True)
class Accelerator:
    """One processor of a rank, its links, and explicit shares of their peaks."""

    name: str = doc("as the plan shows it")
    memory_gib: float = doc("memory of a processor, in GiB", above=0)
    memory_is_shared: bool = doc("all ranks of a machine share that memory")
    tflops: dict[str, float] = doc("peak by precision, without sparsity", above=0)
    memory_gb_per_s: float = doc("bandwidth of the memory, in GB/s", above=0)
    link_gb_per_s: float = doc("bandwidth between ranks of a machine, one direction", above=0)
    network_gb_per_s: float = doc("bandwidth between machines, of a rank", above=0)
    collective_latency_s: float = doc("seconds of a small all-reduce in a machine", minimum=0)
    ranks_per_node: int = doc("ranks of a machine", minimum=1)
    training_share: float = doc("share of the peak in forward and backward passes", **_SHARE)
    prefill_share: float = doc("share of the peak in a forward pass alone", **_SHARE)
    decode_share: float = doc("share of the peak where many sequences are decoded", **_SHARE)
    bandwidth_share: float = doc("share of the memory's bandwidth", **_SHARE)
    network_share: float = doc("share of the bandwidth between ranks and machines", **_SHARE)
    overlap_share: float = doc("share of an exchange that computation hides", minimum=0, maximum=1)
    layer_latency_s: float = doc("least seconds of a layer for one decoded token", minimum=0)
    fused_attention: bool = doc("no attention scores are stored")
    usable_share: float = doc("share of the memory that can be used", **_SHARE)
    base_gib: float = doc("memory of a rank without a model, in GiB", minimum=0)
    launcher_gib: float = doc("memory of the process that starts the ranks, in GiB", minimum=0)
    transient_share: float = doc("memory taken for what is asked for, as a factor", above=0)
    start_s: float = doc("seconds of imports and loading", minimum=0)

    def link(self, span: int) -> float:
        """Bytes a second of a group of so many neighbouring ranks, in one direction."""
        inside = span <= self.ranks_per_node
        return 1e9 * self.network_share * (self.link_gb_per_s if inside else self.network_gb_per_s)

    def flops(self, dtype: str, share: float) -> float:
        """Operations a second at a share of the peak."""
        return 1e12 * self.tflops[dtype] * share
