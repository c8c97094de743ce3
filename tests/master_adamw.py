"""AdamW for 16-bit parameters that keeps an fp32 master of each in its state, as TransformerEngine's FusedAdam does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from llmtailor.checkpoint import open_checkpoint
from llmtailor.load import plan_load
from llmtailor.model_state import read_model
from tiny_models import Snapshot
from writer.trainings import Training

LEAF = "master_param"


class MasterAdamW(torch.optim.Optimizer):
    """``state[parameter]``: ``step``, the master, ``exp_avg``, ``exp_avg_sq``; all in fp32.

    Source: TransformerEngine 2.9, pytorch/optimizers/fused_adam.py (the names in ``state``).
    """

    def __init__(self, params: Any, lr: float = 1e-2, *, leaf: str = LEAF) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})
        self.leaf = leaf

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state[self.leaf] = parameter.detach().float()
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        gradient, master = parameter.grad.float(), state[self.leaf]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        count = state["step"].item()
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        master.mul_(1 - group["lr"] * group["weight_decay"])
        master.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**count))
        parameter.copy_(master)


def new_training(directory: Path, *, dtype: torch.dtype = torch.bfloat16, leaf: str = LEAF, **how: Any) -> Training:
    """A training whose optimizer keeps masters; ``how`` is of ``Checkpointer``, but for ``model``."""
    models = {"model": how.pop("model")} if "model" in how else {}
    training = Training(directory=directory / "run", dtype=dtype, options=how, **models)
    training.optimizer = MasterAdamW(training.model.parameters(), leaf=leaf)
    return training


def fresh(training: Training) -> Training:
    """The same model and optimizer, with other values and no state; it cannot be saved."""
    model = copy.deepcopy(training.model)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = MasterAdamW(model.parameters(), leaf=training.optimizer.leaf)  # type: ignore[attr-defined]
    other = copy.copy(training)
    other.model, other.optimizer, other.states, other.handles = model, optimizer, {}, []
    return other


def load(path: Path, training: Training) -> Training:
    """A fresh training that goes on from a checkpoint."""
    resumed, checkpoint = fresh(training), open_checkpoint(path)
    plan_load(checkpoint, read_model(resumed.model), [resumed.optimizer]).fill()
    resumed.step = checkpoint.manifest.step
    return resumed


def weights_that_are_not_rounded_masters(state: Snapshot, leaf: str = LEAF) -> set[str]:
    masters = {key.removeprefix("state.").removesuffix(f".{leaf}"): key for key in state if key.endswith(f".{leaf}")}
    assert masters
    return {fqn for fqn, key in masters.items() if not torch.equal(state[key].to(state[fqn].dtype), state[fqn])}
