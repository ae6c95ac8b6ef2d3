"""For tests, ours and third parties': closed-form teachers, tiny networks, a quick engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffdistill.checkpoint import Checkpoints
from diffdistill.data.stream import TensorStream
from diffdistill.denoiser import Denoiser
from diffdistill.ema import EmaConfig
from diffdistill.engine import Engine, OptimConfig, TrainConfig
from diffdistill.method import Method
from diffdistill.parts.rollout import sample
from diffdistill.registry import get_method
from diffdistill.run import make_roles
from diffdistill.schedules import EDM, Schedule, bcast
from diffdistill.tokens import TokenModel


class GaussianNet(nn.Module):
    """The exact denoiser of N(mean, std^2) per coordinate; mean and std are parameters.

    D(z, t) = mean + alpha std^2 (z - alpha mean) / (alpha^2 std^2 + sigma^2)
    """

    def __init__(self, mean: Tensor, std: Tensor, schedule: Schedule):
        super().__init__()
        self.mean, self.std, self.schedule = nn.Parameter(mean), nn.Parameter(std), schedule

    def forward(self, z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        alpha, sigma = bcast(self.schedule.alpha(t), z), bcast(self.schedule.sigma(t), z)
        var = self.std.square()
        gain = alpha * var / (alpha.square() * var + sigma.square())
        return self.mean + gain * (z - alpha * self.mean)


def gaussian(
    mean: tuple[float, ...], std: float | tuple[float, ...], schedule: Schedule | None = None
) -> Denoiser:
    """A teacher whose data are N(mean, std^2), independent coordinates."""
    schedule = schedule or EDM()
    m = torch.tensor(mean)
    s = torch.as_tensor(std, dtype=torch.float32).expand_as(m).clone()
    return Denoiser(GaussianNet(m, s, schedule), schedule, "x0", shape=(len(mean),))


class MixtureNet(nn.Module):
    """The exact denoiser of an even mixture of N(means[k], std^2 I), and a correction that learns.

    D(z, t) = sum_k w_k (means_k + g (z - alpha means_k)),  v = alpha^2 std^2 + sigma^2,
    g = alpha std^2 / v,  w = softmax over k of -|z - alpha means_k|^2 / 2v.
    The correction starts at zero: a copy of the teacher is exact, and can become a student or a
    fake score.
    """

    means: Tensor  # [K, d]

    def __init__(self, means: Tensor, std: float, schedule: Schedule, width: int = 64):
        super().__init__()
        self.register_buffer("means", means)
        self.std, self.schedule = std, schedule
        inputs, outputs = means.shape[1] + 1, means.shape[1]
        self.correction = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs),
        )  # fmt: skip
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        alpha, sigma = bcast(self.schedule.alpha(t), z), bcast(self.schedule.sigma(t), z)
        var = alpha.square() * self.std**2 + sigma.square()
        gaps = z[:, None] - alpha[..., None] * self.means
        weights = (-gaps.square().sum(-1) / (2 * var)).softmax(1)[..., None]
        exact = (weights * (self.means + (alpha * self.std**2 / var)[..., None] * gaps)).sum(1)
        scale = (alpha.square() + sigma.square()).rsqrt()
        inputs = torch.cat([scale * z, (sigma / alpha).log() / 4], 1)
        return exact + scale * sigma * self.correction(inputs)


def mixture(
    means: Sequence[tuple[float, ...]], std: float, schedule: Schedule | None = None
) -> Denoiser:
    """A teacher whose data are an even mixture of N(means[k], std^2 I); its copies can learn."""
    schedule = schedule or EDM()
    net = MixtureNet(torch.tensor(means), std, schedule)
    return Denoiser(net, schedule, "x0", shape=(len(means[0]),), sigma_data=1.0)


class PredictionNet(nn.Module):
    """A clean-estimate network re-expressed as eps, v or flow: tests every prediction type."""

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: str):
        super().__init__()
        self.net, self.schedule, self.prediction = net, schedule, prediction

    def forward(self, z: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        x0 = self.net(z, t, **cond)
        alpha, sigma = bcast(self.schedule.alpha(t), z), bcast(self.schedule.sigma(t), z)
        eps = (z - alpha * x0) / sigma
        outs = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        return outs[self.prediction]


class TinyConvNet(nn.Module):
    """A trainable image network with a feature layer (`mid`) and class labels."""

    def __init__(self, channels: int = 1, width: int = 16, classes: int = 4):
        super().__init__()
        self.inp = nn.Conv2d(channels, width, 3, padding=1)
        self.mid = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU())
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        self.time_embedding = nn.Linear(1, width)
        self.label = nn.Embedding(classes, width)

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        t_in = (t.float().abs() + 1e-3).log().view(-1, 1)
        shift = self.time_embedding(t_in) + self.label(label)
        return self.out(self.mid(self.inp(z) + shift[:, :, None, None]))


class ShiftNet(nn.Module):
    """Its estimate is its condition `shift` [B, 1], plus a parameter that is 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return self.mean + shift + 0 * z


def shifted(schedule: Schedule) -> Denoiser:
    """A teacher of samples [1] whose null condition is 0: at shift 1 its guided estimate is the
    guidance, so that a test sees who is guided."""
    null = {"shift": torch.zeros(1, 1)}
    return Denoiser(ShiftNet(), schedule, "x0", shape=(1,), null_cond=null)


def tiny_denoiser(
    schedule: Schedule | None = None, prediction: str = "eps", size: int = 8
) -> Denoiser:
    """An untrained image denoiser with labels 0..2, null class 3 and a feature layer."""
    return Denoiser(
        TinyConvNet(), schedule or EDM(), prediction, shape=(1, size, size),  # type: ignore[arg-type]
        null_cond={"label": torch.tensor([3])}, feature_layer="mid",
    )  # fmt: skip


def run_method(
    name: str | type[Method],
    teacher: Denoiser | TokenModel,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float | Mapping[str, float] = 1e-2,
    x: Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    checkpoint_every: int = 0,
    micro_batch: int = 0,
    train: bool = True,
    optim: Mapping[str, OptimConfig] | None = None,
    **options: Any,
) -> Engine:
    """Train a method on a CPU in fp32 and return its engine. `options` go into its Config."""
    cls = get_method(name) if isinstance(name, str) else name
    teacher.requires_grad_(False)
    torch.manual_seed(seed)
    cfg = cls.Config(**options)
    cfg.validate()
    method = cls(cfg, teacher)
    roles = make_roles(method, teacher)
    for module in roles.values():
        module.requires_grad_(True)
    method.attach(roles)
    size = len(x) if x is not None else 4096
    wrapped = None if pairs is None else (*pairs, cond or {})
    stream = TensorStream(size, teacher.shape, cond or {}, x=x, pairs=wrapped, seed=seed)
    if optim is None:
        rates = {"default": lr} if isinstance(lr, float) else lr
        optim = {k: OptimConfig(lr=v, weight_decay=0.0) for k, v in rates.items()}
    acc = Accelerator(cpu=True)
    checkpoints = None
    if folder is not None:
        checkpoints = Checkpoints(folder / "checkpoints", main=acc.is_main_process)
    engine = Engine(
        method, roles, stream, optim=optim, ema={"default": EmaConfig(value=0.99)},
        train=TrainConfig(steps=steps, batch_size=batch_size, micro_batch=micro_batch, seed=seed),
        accelerator=acc, checkpoints=checkpoints, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    if train:
        engine.fit()
    return engine


@torch.no_grad()
def student_samples(engine: Engine, n: int, cond: Mapping[str, Tensor] | None = None) -> Tensor:
    """Samples of the live student(s) with their own sampler. float32 [n, ...]."""
    method = engine.method
    students = [getattr(method, name) for name in method.students]
    student = students[0]
    rng = torch.Generator().manual_seed(1)
    sampler = method.sampler()
    noises = [torch.randn(n, *student.shape, generator=rng) for _ in sampler.times]
    denoise = students if sampler.experts else student
    return sample(denoise, student.schedule, noises, cond or {}, sampler)


def tiny_tokens(kind: str = "raster", size: int = 8, **choice: Any) -> Any:
    """An untrained AutoregressivePipeline of four classes: raster order, or scales 1 and 2.

    `size` 8 gives 2 x 2 tokens; images are grey.
    """
    from diffdistill.pipelines.autoregressive import AutoregressivePipeline
    from diffdistill.pipelines.token_nets import MultiScaleTransformer, RasterTransformer
    from diffdistill.pipelines.vq import VQTokenizer

    torch.manual_seed(0)
    grid = size // 4
    scales = list(range(1, grid + 1)) if kind == "scales" else None
    vq = VQTokenizer(
        size, 1, (16, 16), 1, 16, 12, 4, scales, normalise=scales is None, fold=2, norm_groups=8
    )
    shape = {"codes": 12, "channels": 4, "classes": 10, "width": 32, "layers": 2, "heads": 2}
    if scales is None:
        net = RasterTransformer(**shape, grid=grid)
    else:
        net = MultiScaleTransformer(**shape, scales=scales)
        choice = {"rule": "linear"} | choice
    with torch.no_grad():  # logits that differ between prefixes and classes
        for p in net.parameters():
            p.normal_(std=0.2)
    return AutoregressivePipeline(net.eval(), vq.eval(), guidance=1.5, **choice)


class TableNet(nn.Module):
    """Two tokens with known probabilities, and small students of them.

    As a teacher: logits log p(q_1) and, for a continuous q_1, log p(q_2 | q_1) interpolated between
    the codes by a softmax of the squared distances.
    """

    def __init__(self, first: Tensor, second: Tensor, codes: Tensor, kind: str = "teacher"):
        super().__init__()
        self.register_buffer("first", first.log())
        self.register_buffer("second", second.log().clamp_min(-1e4))
        self.register_buffer("codes", codes)
        self.config = SimpleNamespace(indices=False, classes=0, kind=kind)
        count, channels, width = *codes.shape, 96

        def layers(inputs: int, outputs: int, depth: int = 2) -> nn.Sequential:
            sizes = [inputs, *[width] * depth, outputs]
            made = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.SiLU())]
            return nn.Sequential(*made[:-1])

        if kind == "diffusion":
            self.start = nn.Parameter(torch.randn(width) / 10)
            self.backbone = layers(channels, width)
            self.head = layers(channels + 2 + width, channels, 3)
        elif kind == "jump":
            self.one, self.two = layers(channels, count), layers(2 * channels + 1, count)

    def cache(self) -> list[None]:
        return []

    def variant(self, kind: str, codebook: Tensor, **options: Any) -> TableNet:
        return TableNet(self.first.exp(), self.second.exp(), self.codes, kind)

    def logits(self, inputs, label, rows, cache=None) -> Tensor:
        parts = []
        if 0 in rows:
            parts.append(self.first.expand(len(label), -1))
        if 1 in rows:
            near = -(inputs[:, -1, None] - self.codes).square().sum(-1) / 0.05
            parts.append(near.softmax(-1) @ self.second)
        return torch.stack(parts, 1)

    def features(self, inputs, label, rows=None, cache=None) -> Tensor:
        return torch.stack([self.start.expand(len(label), -1), self.backbone(inputs[:, 0])], 1)

    def velocity(self, z: Tensor, t: Tensor, f: Tensor) -> Tensor:
        time = torch.stack([t, t.log()], -1)
        return self.head(torch.cat([z, time, f.expand(*z.shape[:-1], -1)], -1))

    def jump(self, x: Tensor, is_data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        flag = is_data[0].to(x.dtype).expand(len(x), 1)
        logits = torch.stack([self.one(x[:, 0]), self.two(torch.cat([x.flatten(1), flag], 1))], 1)
        return logits, logits.softmax(-1) @ self.codes


def table(
    first: Sequence[float], second: Sequence[Sequence[float]], codes: Sequence[Sequence[float]]
) -> TokenModel:
    """An autoregressive teacher of two tokens: p(q_1), rows p(q_2 | q_1), codes [V, C]."""
    book = torch.tensor(codes)
    net = TableNet(torch.tensor(first), torch.tensor(second), book)
    return TokenModel(net, book, (1, 1), inputs=lambda q: q[:, :-1], decode=lambda q: q)


def joint(tokens: Tensor, count: int) -> Tensor:
    """Frequencies [V, V] of token pairs, int [N, 2]."""
    flat = (tokens[:, 0] * count + tokens[:, 1]).long()
    return torch.bincount(flat, minlength=count**2).view(count, count) / len(tokens)
