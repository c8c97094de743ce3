"""AdamW for 16-bit parameters that updates fp32 masters, which it keeps in its state."""

from __future__ import annotations

from typing import Any

import torch


class MasterAdamW(torch.optim.Optimizer):
    """``state[parameter]``: ``step``, ``master_param``, ``exp_avg``, ``exp_avg_sq``; all but the step in fp32.

    Source: TransformerEngine 2.9, pytorch/optimizers/fused_adam.py (the names in ``state``).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["master_param"] = parameter.detach().float()
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        state["step"] += 1
        count, (beta1, beta2) = state["step"].item(), group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        state["master_param"].mul_(1 - group["lr"] * group["weight_decay"])
        state["master_param"].addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - beta1**count))
        parameter.copy_(state["master_param"])
