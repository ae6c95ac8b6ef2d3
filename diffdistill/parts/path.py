"""The degradation path of DisBack: snapshots of a network on its way from the teacher.

Zhang et al., "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion
Distillation", arXiv 2408.15991. Node 0 is the teacher and is not stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.ema import trainable
from diffdistill.parts.ratio import over_processes

Storage = Literal["full", "full_bf16", "lora_delta"]


class SnapshotPath(nn.Module):
    """Nodes 1 .. `nodes` of a path, and which of them the target holds. A role: it is checkpointed.

    Args:
        teacher: node 0; its parameters are not copied.
        like: a network with the parameters that are recorded; those the teacher lacks (an adapter
            over the teacher) are 0 at node 0.
        storage: "full" keeps the weights; "full_bf16" their change since node 0 in bfloat16;
            "lora_delta" that change in `rank` singular vectors per matrix.
    """

    node: Tensor
    gap: Tensor

    def __init__(
        self, teacher: nn.Module, like: nn.Module, nodes: int, storage: Storage, rank: int
    ):
        super().__init__()
        base: Mapping[str, Tensor] = dict(teacher.named_parameters())
        own = dict(trainable(like))
        self.base = {n: base.get(n, torch.zeros_like(p)).detach() for n, p in own.items()}
        self.storage, self.rank = storage, rank
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                nn.ParameterList(self._encode(value, value)) for value in self.base.values()
            )
            for _ in range(nodes)
        )
        self.register_buffer("node", torch.tensor(nodes))
        self.register_buffer("gap", torch.tensor(math.inf))

    def store(self, node: int, network: nn.Module) -> None:
        """Record the network as a node. Its parameters must be those of `like`, by name."""
        values = self._matching(network)
        for kept, (name, value) in zip(self.nodes[node - 1], values.items(), strict=True):
            for place, part in zip(kept, self._encode(value, self.base[name]), strict=True):
                place.data.copy_(part)

    def load(self, node: int, network: nn.Module) -> None:
        """Give the network the weights of a node. Its parameters must be those of `like`."""
        for i, (name, value) in enumerate(self._matching(network).items()):
            base = self.base[name].to(value.device)
            value.data.copy_(self._decode(self.nodes[node - 1][i], base) if node else base)
        self.node.fill_(node)
        self.gap.fill_(math.inf)

    def arrive(self, node: int, network: nn.Module) -> None:
        """Load the node, unless the network is further on its way back."""
        if node < self.node or node == len(self.nodes):
            self.load(node, network)

    def early(self, threshold: float, network: nn.Module) -> None:
        """Go back one node if the running mean of the gap at this one is below the threshold."""
        if self.node > 0 and self.gap < threshold:
            self.load(int(self.node) - 1, network)

    @torch.no_grad()
    def note(self, gap: Tensor) -> None:
        """Update the running mean of the gap (0.9 of it is kept), over all processes."""
        both = over_processes(torch.stack([gap.detach().float(), torch.ones_like(gap)]))
        gap = both[0] / both[1]
        self.gap.copy_(torch.where(self.gap.isinf(), gap, torch.lerp(self.gap, gap, 0.1)))

    def _matching(self, network: nn.Module) -> dict[str, nn.Parameter]:
        values = dict(trainable(network))
        if values.keys() != self.base.keys():
            odd = sorted(values.keys() ^ self.base.keys())[:3]
            raise ValueError(f"the path and the network differ in {odd}")
        return {name: values[name] for name in self.base}

    def _encode(self, value: Tensor, base: Tensor) -> list[Tensor]:
        if self.storage == "full":
            return [value.detach().clone()]
        change = value.detach() - base.to(value.device)
        if self.storage == "full_bf16":
            return [change.bfloat16()]
        rows = change.flatten(1) if change.ndim > 1 else change[None]
        if min(rows.shape) <= self.rank or change.ndim < 2:
            return [change]
        u, s, v = torch.linalg.svd(rows.float(), full_matrices=False)
        root = s[: self.rank].sqrt()
        return [u[:, : self.rank] * root, root[:, None] * v[: self.rank]]

    def _decode(self, kept: nn.Module, base: Tensor) -> Tensor:
        parts = list(kept.parameters())
        if self.storage == "full":
            return parts[0]
        change = parts[0] if len(parts) == 1 else (parts[0] @ parts[1]).view_as(base)
        return base + change.to(base.dtype)


def recorder(node: int) -> Callable[[nn.Module, SnapshotPath], None]:
    """For a Transition from the network to the path."""
    return lambda network, path: path.store(node, network)


def loader(node: int) -> Callable[[SnapshotPath, nn.Module], None]:
    """For a Transition from the path to the target."""
    return lambda path, network: path.arrive(node, network)


@torch.no_grad()
def drift(network: nn.Module, teacher: nn.Module) -> Tensor:
    """Distance of the trained parameters from the teacher's; those it lacks count from 0."""
    base = dict(teacher.named_parameters())
    squares = [(p - base.get(n, torch.zeros_like(p))).square().sum() for n, p in trainable(network)]
    return torch.stack(squares).sum().sqrt()
