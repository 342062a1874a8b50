"""Muon for the matrices: momentum whose singular values are evened out. Stacks equal shapes, so a
step is few launches."""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic iteration, steep at zero (Jordan et al., 2024)
_NUM_ITERATIONS = 5


def even_out(matrices: Tensor) -> Tensor:
    """About U V^T of each [n, rows, cols] matrix, in bfloat16 on a GPU."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                shapes.setdefault(param.shape, []).append(param)
            for params in shapes.values():
                self._step_equal(params, group)

    def _step_equal(self, params: list[Tensor], group: dict) -> None:
        grads = torch.stack([param.grad for param in params if param.grad is not None])
        state = self.state[params[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grads)
        momentum = state["momentum"].lerp_(grads, 1 - group["momentum"])
        update = even_out(grads.lerp(momentum, group["momentum"]))
        rows, cols = params[0].shape
        scale = group["lr"] * max(1.0, rows / cols) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind(0)), alpha=-scale)
