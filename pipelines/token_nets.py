"""Transformers over image tokens: LlamaGen's and VAR's, each as teacher and as student.

RasterTransformer: Sun et al., arXiv 2406.06525 (RMSNorm, SwiGLU, rotary positions in 2D).
MultiScaleTransformer: Tian et al., arXiv 2404.02905 (adaptive LayerNorm, normalised queries).

    kind "teacher"    reads q_<i, answers with logits of q_i
    kind "jump"       reads [class, x_1 .. x_n], noise or data, answers at the same position with
                      logits and a vector (Liu et al., arXiv 2412.17153)
    kind "diffusion"  the teacher without its output layer, and a denoising head for each token
                      (Liu et al., arXiv 2510.21003; Li et al., arXiv 2406.11838)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

Kind = Literal["teacher", "jump", "diffusion"]
Cache = list[tuple[Tensor, Tensor] | None]


class TokenNet(ModelMixin, ConfigMixin):
    """What the two transformers share: embeddings, heads, kinds and the passes.

    Attributes that a subclass sets: `label`, `enter`, `blocks` and `mask`.
    """

    def _heads(self, output_bias: bool) -> None:
        c = self.config
        if c.kind not in ("teacher", "jump", "diffusion"):
            raise ValueError(f"kind is {c.kind!r}. Allowed: teacher, jump, diffusion")
        if c.indices and c.kind != "teacher":
            raise ValueError(f"a network of kind {c.kind!r} reads vectors; set indices=False")
        self.label = nn.Embedding(c.classes + 1, c.width)
        if c.indices:
            self.enter = nn.Embedding(c.codes, c.width)
        elif c.reader:
            self.enter = nn.Sequential(
                nn.Linear(c.channels, c.reader), nn.SiLU(), nn.Linear(c.reader, c.width)
            )
        else:
            self.enter = nn.Linear(c.channels, c.width)
        if c.kind == "diffusion":
            self.head = DiffusionHead(c.channels, c.width, c.head_width, c.head_blocks)
            return
        self.output = nn.Linear(c.width, c.codes, bias=output_bias)
        if c.kind == "jump":
            self.flag = nn.Embedding(2, c.width)  # noise 0, data 1
            self.modulation = nn.Parameter(torch.randn(2, c.width) / c.width**0.5)
            self.token = nn.Linear(c.width, c.channels)

    def cache(self) -> Cache:
        """An empty store of keys and values."""
        return [None] * len(self.blocks)

    def variant(self, kind: Kind, codebook: Tensor, **options: Any) -> TokenNet:
        """The same size of network in another kind, with this one's weights where they fit.

        A table of index embeddings becomes the linear map of code vectors that is nearest to it;
        with `reader` a new network, which has to learn the table.
        """
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        new = type(self)(**config | {"kind": kind, "indices": False, "dropout": 0.0} | options)
        new.to(self.label.weight.device)
        state = {k: v for k, v in self.state_dict().items() if not k.startswith("enter.")}
        if isinstance(self.enter, nn.Embedding):  # below, a new reader keeps its own weights
            ones = torch.cat([codebook, torch.ones_like(codebook[:, :1])], 1)
            fit = torch.linalg.lstsq(ones, self.enter.weight.detach().float()).solution
            state |= {"enter.weight": fit[:-1].T, "enter.bias": fit[-1]}
        else:
            state |= {f"enter.{k}": v for k, v in self.enter.state_dict().items()}
        own = new.state_dict()
        new.load_state_dict({k: v for k, v in state.items() if _fits(own.get(k), v)}, strict=False)
        new._carry(self)
        return new

    def _carry(self, source: TokenNet) -> None:
        """Weights whose shape differs between the kinds."""

    # ---- passes -------------------------------------------------------------------------

    def features(
        self, inputs: Tensor, label: Tensor, rows: range | None = None, cache: Cache | None = None
    ) -> Tensor:
        """f(q_<i) at positions `rows`, [B, len(rows), width]; rows None: all of them.

        Args:
            inputs: for these positions but the first of all, [B, r, C], or int64 [B, r].
            cache: keys and values of the positions before `rows`; those of `rows` are added.
        """
        raise NotImplementedError

    def logits(
        self, inputs: Tensor, label: Tensor, rows: range | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits at positions `rows`, [B, len(rows), V]. Arguments as in `features`."""
        return self.output(self.features(inputs, label, rows, cache))

    def velocity(self, z: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """The diffusion head at z [..., C], t [...], features f [..., width]."""
        return self.head(z, t, f)

    def _answers(self, h: Tensor, f: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the features f and vectors of the states h, after the class position."""
        scale, shift = (self.modulation + self.label(label)[:, None]).unsqueeze(2).unbind(1)
        h = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        return self.output(f), self.token(h)


class RasterTransformer(TokenNet):
    """Next token in raster order.

    Args:
        codes, channels: size V of the codebook and C of its vectors.
        classes: labels are 0 .. classes - 1; label `classes` means "no class".
        hidden: of the gated feed-forward; None: two thirds of 4 width, rounded up to a multiple.
        grid: tokens on a side.
        indices: the input is an embedding of the index (LlamaGen), not a map of the code vector.
        reader: hidden units of that map; 0: it is linear.
        head_width, head_blocks: of the diffusion head.
    """

    @register_to_config
    def __init__(
        self,
        codes: int = 128,
        channels: int = 8,
        classes: int = 10,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        grid: int = 4,
        indices: bool = False,
        kind: Kind = "teacher",
        dropout: float = 0.0,
        head_width: int = 192,
        head_blocks: int = 3,
        reader: int = 0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self._heads(output_bias=False)
        hidden = hidden or 32 * -(-8 * width // 96)
        self.blocks = nn.ModuleList(
            _RasterBlock(width, heads, hidden, dropout, norm_eps) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.drop = nn.Dropout(dropout)
        self.register_buffer("rotation", rotary(grid, width // heads), persistent=False)
        count = grid * grid + 1
        self.register_buffer(
            "mask", torch.ones(count, count, dtype=torch.bool).tril(), persistent=False
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if kind == "diffusion":
            self.head.reset()

    def features(self, inputs, label, rows=None, cache=None):
        first = rows is None or rows.start == 0
        h = self.enter(inputs)
        h = torch.cat([self.label(label)[:, None].to(h.dtype), h], 1) if first else h
        return self.norm(self._trunk(h, 0 if rows is None else rows.start, cache))

    def jump(self, x: Tensor, is_data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, n, V] and vectors [B, n, C] from x [B, n, C]; is_data: bool [n]."""
        h = self.enter(x) + self.flag(is_data.long())
        start = self.label(label) + self.flag.weight[1]
        h = self._trunk(torch.cat([start[:, None].to(h.dtype), h], 1), 0, None)[:, 1:]
        return self._answers(h, self.norm(h), label)

    def _trunk(self, h: Tensor, start: int, cache: Cache | None) -> Tensor:
        h, stop = self.drop(h), start + h.shape[1]
        rotation, mask = self.rotation[start:stop], self.mask[start:stop, :stop]
        for i, block in enumerate(self.blocks):
            h = block(h, rotation, mask, cache, i)
        return h


class MultiScaleTransformer(TokenNet):
    """Next scale: all tokens of a scale at once, given the earlier scales.

    Args:
        scales: side of each scale's token map.
        normalised: queries and keys have unit length and a learned temperature per head.
        shared: all blocks read one modulation of the class (VAR-d36).
        ratio: hidden units of the feed-forward, in widths.
        Others: as in RasterTransformer.
    """

    @register_to_config
    def __init__(
        self,
        codes: int = 128,
        channels: int = 8,
        classes: int = 10,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        scales: Sequence[int] = (1, 2, 3, 4),
        normalised: bool = True,
        shared: bool = False,
        ratio: float = 4.0,
        indices: bool = False,
        kind: Kind = "teacher",
        dropout: float = 0.0,
        head_width: int = 192,
        head_blocks: int = 3,
        reader: int = 0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if scales[0] != 1:
            raise ValueError(f"scales {list(scales)} must begin with 1, the place of the class")
        self._heads(output_bias=True)
        jump = kind == "jump"
        self.blocks = nn.ModuleList(
            _ScaleBlock(width, heads, round(ratio * width), normalised, shared, dropout, norm_eps,
                        jump)
            for _ in range(layers)
        )  # fmt: skip
        self.modulate = nn.Linear(width, 6 * width) if shared else None
        self.final = nn.Linear(width, 2 * width)
        sizes = [1] * jump + [s * s for s in scales]
        level = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.first = nn.Parameter(torch.empty(1, 1, width))
        self.place = nn.Parameter(torch.empty(1, len(level), width))
        self.scale = nn.Embedding(len(sizes), width)
        mask = level[:, None] >= level
        if jump:  # earlier scales, and of its own scale only itself
            mask = (level[:, None] > level) | torch.eye(len(level), dtype=torch.bool)
            self.late = nn.Linear(width, width)
        self.register_buffer("level", level, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        std = math.sqrt(1 / self.config.width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.first, std=std)
        nn.init.trunc_normal_(self.place, std=std)
        for block in self.blocks:
            block.calm(len(self.blocks))
        if self.config.kind == "diffusion":
            self.head.reset()
        else:
            self.output.weight.mul_(0.02)

    def _carry(self, source: TokenNet) -> None:
        """The tables of a jump student have one more level in front, for the class."""
        if self.config.kind == "jump" and source.config.kind != "jump":
            with torch.no_grad():
                self.scale.weight[1:] = source.scale.weight
                self.place[:, 1:] = source.place

    def features(self, inputs, label, rows=None, cache=None):
        rows = range(len(self.level)) if rows is None else rows
        cond = self.label(label)
        h = self.enter(inputs)
        if rows.start == 0:
            start = cond[:, None] + self.first
            h = torch.cat([start.to(h.dtype), h], 1)
        h = self._trunk(h + self._places(rows), cond, rows.start, cache)
        return self._final(h, cond)

    def jump(self, x: Tensor, is_data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, n, V] and vectors [B, n, C] from x [B, n, C]; is_data: bool [n]."""
        cond = self.label(label)
        flag = self.flag(F.pad(is_data.long(), (1, 0), value=1))
        h = self.enter(x)
        h = torch.cat([cond[:, None].to(h.dtype), h], 1) + flag
        h = self._trunk(h + self._places(range(len(self.level))), cond, 0, None, flag)
        h = (h + self.late(flag))[:, 1:]
        return self._answers(h, self._final(h, cond), label)

    def _places(self, rows: range) -> Tensor:
        at = slice(rows.start, rows.stop)
        return self.place[:, at] + self.scale(self.level[at])

    def _trunk(self, h, cond, start, cache, flag=None) -> Tensor:
        mask = self.mask[start : start + h.shape[1], : start + h.shape[1]]
        if self.modulate is not None:
            cond = self.modulate(F.silu(cond)).view(-1, 6, self.config.width)
        for i, block in enumerate(self.blocks):
            h = block(h, cond, mask, cache, i, flag)
        return h

    def _final(self, h: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.final(F.silu(cond)).unflatten(-1, (1, 2, -1)).unbind(2)
        return F.layer_norm(h, h.shape[-1:], eps=self.config.norm_eps) * (1 + scale) + shift


class DiffusionHead(nn.Module):
    """Velocity of one token from its noisy vector, the time and a feature of the transformer.

    A residual MLP with adaptive LayerNorm; zero at the start.
    """

    def __init__(self, channels: int, features: int, width: int, blocks: int):
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.given = nn.Linear(features, width)
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.final = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels)

    @torch.no_grad()
    def reset(self) -> None:
        """Ordinary weights inside, zeros where blocks and the head end."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.modulations, self.final, self.leave):
            nn.init.zeros_(module.weight)

    def forward(self, z: Tensor, t: Tensor, f: Tensor) -> Tensor:
        """z [..., C], t [...] in [0, 1], f [..., features] -> [..., C]."""
        rates = torch.exp(-math.log(10_000) * torch.arange(64, device=z.device) / 64)
        angle = 1000 * t[..., None].float() * rates
        time = torch.cat([angle.cos(), angle.sin()], -1).to(z.dtype)
        cond = F.silu(self.time(time) + self.given(f.to(z.dtype)))
        h = self.enter(z)
        for modulation, layer in zip(self.modulations, self.layers, strict=True):
            gate, scale, shift = modulation(cond).chunk(3, -1)
            h = h + gate * layer(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        scale, shift = self.final(cond).chunk(2, -1)
        return self.leave(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)


class _RasterBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, h, rotation, mask, cache, index):
        q, k, v = _split(self.qkv(self.norm1(h)), self.heads)
        q, k = rotate(q, rotation), rotate(k, rotation)
        h = h + self.drop(self.proj(_attend(q, k, v, mask, cache, index)))
        x = self.norm2(h)
        return h + self.drop(self.down(F.silu(self.gate(x)) * self.up(x)))


class _ScaleBlock(nn.Module):
    def __init__(
        self, width: int, heads: int, hidden: int, normalised: bool, shared: bool, dropout: float,
        eps: float, flagged: bool,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.eps, self.width = heads, eps, width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.temperature = None
        if normalised:
            self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.modulate = None if shared else nn.Linear(width, 6 * width)
        self.offset = nn.Parameter(torch.randn(6, width) / width**0.5) if shared else None
        self.flag = nn.Linear(width, width) if flagged else None
        self.drop = nn.Dropout(dropout)

    def calm(self, depth: int) -> None:
        """Residual branches start near zero."""
        self.proj.weight.div_(math.sqrt(2 * depth))
        self.down.weight.div_(math.sqrt(2 * depth))
        if self.modulate is not None:
            self.modulate.weight[: 2 * self.width].mul_(1e-5)
            self.modulate.weight[2 * self.width :].mul_(0.5)

    def forward(self, h, cond, mask, cache, index, flag):
        if self.modulate is None:
            parts = (self.offset + cond).unsqueeze(2)
        else:
            parts = self.modulate(F.silu(cond)).view(-1, 6, 1, self.width)
        gate1, gate2, scale1, scale2, shift1, shift2 = parts.unbind(1)
        norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=self.eps)  # noqa: E731
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        x = norm(h) * (1 + scale1) + shift1
        q, k, v = _split(F.linear(x, self.qkv.weight, bias), self.heads)
        factor = 0.25 / math.sqrt(q.shape[-1])
        if self.temperature is not None:
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=math.log(100)).exp()
            k, factor = F.normalize(k, dim=-1), 1.0
        out = self.drop(self.proj(_attend(q, k, v, mask, cache, index, factor)))
        h = h + out * gate1
        if self.flag is not None:
            h = h + self.flag(flag)
        x = norm(h) * (1 + scale2) + shift2
        return h + self.drop(self.down(F.gelu(self.up(x), approximate="tanh"))) * gate2


def rotary(grid: int, size: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines [1 + grid^2, size / 2, 2]: half of the pairs turn with y, half with x.

    The row of the class is zero, as in LlamaGen's code: its query and key vanish, so the class
    position is attended with weight exp(0).
    """
    rates = base ** (-torch.arange(0, size // 2, 2) / (size // 2))
    angle = torch.arange(grid)[:, None] * rates
    y, x = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    both = torch.cat([y, x], -1).flatten(0, 1)
    table = torch.stack([both.cos(), both.sin()], -1)
    return torch.cat([torch.zeros(1, *table.shape[1:]), table])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [B, H, r, size] by rotation [r, size / 2, 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(q, k, v, mask, cache, index, scale=None) -> Tensor:
    """Attention over stored and new keys, [B, r, width]."""
    if cache is not None:
        if cache[index] is not None:
            k = torch.cat([cache[index][0], k], 2)
            v = torch.cat([cache[index][1], v], 2)
        cache[index] = k, v
    out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _fits(own: Tensor | None, given: Tensor) -> bool:
    return own is not None and own.shape == given.shape
