"""What a processor can do, and how much of that a run gets: `conf/accelerator/`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Accelerator:
    """One processor of a rank, its links, and explicit shares of their peaks."""

    name: str
    memory_gib: float
    memory_is_shared: bool
    tflops: dict[str, float]
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    collective_latency_s: float
    ranks_per_node: int
    training_share: float
    prefill_share: float
    decode_share: float
    bandwidth_share: float
    network_share: float
    overlap_share: float
    layer_latency_s: float
    fused_attention: bool
    usable_share: float
    base_gib: float
    launcher_gib: float
    transient_share: float
    start_s: float

    def link(self, span: int) -> float:
        """Bytes a second of a group of so many neighbouring ranks, in one direction."""
        inside = span <= self.ranks_per_node
        return 1e9 * self.network_share * (self.link_gb_per_s if inside else self.network_gb_per_s)

    def flops(self, dtype: str, share: float) -> float:
        """Operations a second at a share of the peak."""
        return 1e12 * self.tflops[dtype] * share
