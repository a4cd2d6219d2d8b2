"""Muon, the optimizer of the block matrices."""

from __future__ import annotations

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) in float32 and all matrices of a shape at once: torch's own is in
    bfloat16 and one by one, which costs a processor more than the whole step."""

    def __init__(self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                for part in zip(heads_apart(p), heads_apart(update), strict=True):
                    shapes.setdefault(part[0].shape, []).append(part)
            for (rows, columns), parts in shapes.items():
                updates = orthogonal(torch.stack([update for _, update in parts]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for (p, _), update in zip(parts, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def heads_apart(matrix: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value of a joint projection, else the matrix alone; views."""
    rows, columns = matrix.shape
    return matrix.split(columns) if rows == 3 * columns else (matrix,)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly, by Newton-Schulz steps, (N, rows, columns)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x
