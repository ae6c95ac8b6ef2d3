"""Muon, the optimizer that makes every matrix update orthogonal, for networks with convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic


class Muon(torch.optim.AdamW):
    """Muon for tensors of two or more dimensions (first x the rest), AdamW for the others.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the step
    size 0.2 lr sqrt(max(rows, columns)) of Liu et al., arXiv 2502.16982: an update has AdamW's
    root mean square, so that AdamW's learning rates carry over. `torch.optim.Muon` computes the
    same for matrices, and takes nothing else. Deviation: the first and last layers are included.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        lr, decay = (self.param_groups[0][k] for k in ("lr", "weight_decay"))
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = {p: p.grad for p in params if p.ndim > 1 and p.grad is not None}
        same: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, grad in gradients.items():
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            mean = self.state[p]["momentum"]
            mean.lerp_(grad, 1 - self.momentum)
            update = grad.lerp(mean, self.momentum).reshape(len(p), -1)
            same.setdefault(tuple(update.shape), []).append((p, update))
            p.grad = None
        super().step(closure)  # what is left
        for shape, pairs in same.items():
            updates = orthogonal(torch.stack([update for _, update in pairs]))
            for (p, _), update in zip(pairs, updates, strict=True):
                p.mul_(1 - lr * decay)
                p.add_(update.view(p.shape), alpha=-0.2 * lr * max(shape) ** 0.5)
                p.grad = gradients[p]


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Singular values moved to about 1 (0.7 to 1.2) by Newton-Schulz steps in bf16. [..., m, n]"""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
