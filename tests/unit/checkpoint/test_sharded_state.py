"""An optimizer that counts its steps by group, as Transformer Engine's FusedAdam, is resumed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from opcd_nemo.checkpoint.sharded_state import load_optimizer, prepare_loading


class GroupCounting(torch.optim.Optimizer):
    """Knows two moments a parameter and refuses other names, as FusedAdam's `state_dict` does."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def state_dict(self) -> dict[str, Any]:
        for state in self.state.values():
            assert set(state) <= {"exp_avg", "exp_avg_sq"}, set(state)
        return super().state_dict()


def start_moments(optimizer: torch.optim.Optimizer, _: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][name] = torch.zeros_like(parameter)


def part_of(optimizer: torch.optim.Optimizer) -> Any:
    """What `_load_optimizer` uses of Megatron's DistributedOptimizer."""

    def load_state_dict(loaded: dict[str, Any]) -> None:
        (group,) = loaded["optimizer"]["param_groups"]
        state = optimizer.state_dict()
        optimizer.load_state_dict(
            {**state, "param_groups": [{**state["param_groups"][0], "step": group["step"]}]}
        )

    def load_moments(moments: dict[int, Any]) -> None:
        for index, state in enumerate(optimizer.state.values()):
            for name, value in moments[index].items():
                state[name].copy_(value)

    return SimpleNamespace(
        optimizer=optimizer,
        config=None,
        init_state_fn=start_moments,
        load_state_dict=load_state_dict,
        load_parameter_state_from_fully_reshardable=load_moments,
    )


def test_an_optimizer_that_counts_by_group_goes_on_from_its_count() -> None:
    optimizer = GroupCounting([torch.zeros(3), torch.zeros(2)])
    whole = SimpleNamespace(chained_optimizers=[part_of(optimizer)])
    prepare_loading(whole)
    moments = {
        index: {"exp_avg": torch.full((size,), 1.5), "exp_avg_sq": torch.full((size,), 2.5)}
        for index, size in enumerate((3, 2))
    }
    loaded = {"optimizer": {"param_groups": [{"step": 7}]}, "param_state": moments}
    load_optimizer(whole, loaded)
    assert optimizer.param_groups[0]["step"] == 7
    for state in optimizer.state_dict()["state"].values():
        assert set(state) == {"exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].unique().tolist() == [1.5]
