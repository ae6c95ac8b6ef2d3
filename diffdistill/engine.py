"""The one training loop. It knows no method by name.

Semantics (every method spec relies on them):

* Steps count from 0; an update runs when step % every == offset and start <= step < stop.
* The loss of an update is the sum of the returned scalars; names starting with "_" are logged only.
* During an update only its roles require gradients and are in train mode. Gradients still flow
  through the other networks to the student.
* `after` of an update is called behind its optimizer steps, without gradients.
* All updates of a step see the same micro-batches; only the second and later runs of an update
  with `repeat` draw fresh ones.
* Noise is a function of (seed, step, update, repeat, micro-batch, rank), so a resumed run needs no
  random state and any step can be replayed alone.
* A sample weighs 1 / global batch: expected gradients do not depend on accumulation or processes.

Networks are not wrapped for data parallelism: after the last micro-batch, the gradients of each
trained role are averaged over processes by one flat all-reduce. So partial passes (discriminator
features), JVPs and plain attribute access work on any number of processes. Sharded networks (FSDP)
are refused: their gradients, averages and checkpoints would each be a part taken for the whole.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from diffdistill.checkpoint import Checkpoints
from diffdistill.ema import Ema, EmaConfig, trainable
from diffdistill.method import Batch, Method, Update
from diffdistill.muon import Muon
from diffdistill.tracking import Tracker


@dataclass
class OptimConfig:
    """Optimizer of one role. None means: as in `optim.default`."""

    name: Literal["adamw", "muon"] | None = None  # muon: see diffdistill/muon.py
    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    clip: float | None = None  # global gradient norm
    warmup: int | None = None  # updates of the role, linear from 0
    decay: Literal["constant", "cosine", "linear"] | None = None  # to `final` of lr
    final: float | None = None  # fraction of lr at the end of the decay


DEFAULT_OPTIM = OptimConfig(
    name="adamw", lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, clip=10.0, warmup=0,
    decay="constant", final=0.0,
)  # fmt: skip


@dataclass
class TrainConfig:
    steps: int = 1000  # engine steps; each runs every update that is due
    batch_size: int = 64  # global, over processes and accumulation
    micro_batch: int = 0  # per process; 0: batch_size / processes
    seed: int = 0
    max_skipped: int = 10  # non-finite updates of one role in a row before the run stops


class Stream(Protocol):
    """Micro-batches as a pure function of the step."""

    def batch(self, step: int, draw: int, rows: range, batch_size: int) -> Batch:
        """Rows `rows` of the global batch of this step; `draw` > 0 gives fresh ones."""
        ...


@dataclass
class Every:
    """A callback: fn(engine) before step 0, then after every `every` steps and at the end."""

    every: int
    fn: Callable[[Engine], None]
    at_start: bool = True


class NonFinite(RuntimeError):
    """Too many non-finite updates in a row."""


@dataclass
class Role:
    """A trained network with its optimizer."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    cfg: OptimConfig
    params: list[nn.Parameter]
    updates: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    total: int = 1  # updates in the whole run, for lr decay
    ema: dict[str, Ema] = field(default_factory=dict)


def optim_of(role: str, optim: Mapping[str, OptimConfig]) -> OptimConfig:
    """Settings of one role: its own, then `default`, then the package's defaults."""
    layers = (optim.get(role), optim.get("default"), DEFAULT_OPTIM)
    pick = lambda name: next(  # noqa: E731
        v for layer in layers if layer is not None and (v := getattr(layer, name)) is not None
    )
    return OptimConfig(**{name: pick(name) for name in OptimConfig.__dataclass_fields__})


def step_seed(*numbers: int) -> int:
    """A 63-bit seed that is a function of the given integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def refuse_shards(role: str, params: Sequence[nn.Parameter]) -> None:
    """ValueError: parameters of which each process holds a part."""
    from torch.distributed.tensor import DTensor  # slow to import

    if any(isinstance(p, DTensor) for p in params):
        raise ValueError(
            f"the network of role {role!r} is sharded (its parameters are DTensors, as FSDP2 makes "
            "them). Allowed: whole networks, the same on every process; the engine averages their "
            "gradients. Leave out fully_shard and accelerate's FSDP plugin"
        )


class Engine:
    """Runs a method. `roles` are the trained networks, already on the accelerator's device."""

    def __init__(
        self,
        method: Method,
        roles: Mapping[str, nn.Module],
        stream: Stream,
        *,
        train: TrainConfig,
        optim: Mapping[str, OptimConfig],
        ema: Mapping[str, EmaConfig],
        accelerator: Accelerator,
        tracker: Tracker | None = None,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 0,
        log_every: int = 10,
    ):
        self.method, self.stream, self.cfg, self.acc = method, stream, train, accelerator
        self.tracker, self.checkpoints = tracker, checkpoints
        self.checkpoint_every, self.log_every = checkpoint_every, log_every
        self.updates = method.updates()
        self.transitions = method.transitions()
        self.step = 0
        self.seconds = 0.0  # wall time of training steps, over restarts
        self.earlier_passes = 0
        self.preempted = False
        self.latest: dict[str, float] = {}  # values of the last line of the log
        self._check_names(roles, optim)
        self.micro = self._micro_batch()
        self.roles = {n: self._role(n, roles[n], optim, ema) for n in roles}
        self._frozen_for: tuple[str, ...] | None = None

    # ---- set-up -------------------------------------------------------------------------

    def _check_names(
        self, roles: Mapping[str, nn.Module], optim: Mapping[str, OptimConfig]
    ) -> None:
        named = {r for u in self.updates for r in u.trains}
        if not named <= set(roles):
            raise ValueError(
                f"updates train {sorted(named - set(roles))}, roles are {sorted(roles)}"
            )
        if stray := set(optim) - {"default", *roles}:
            raise ValueError(
                f"optim has settings for {sorted(stray)}, but this method has the roles "
                f"{sorted(roles)}. Remove them or use one of: default, {', '.join(sorted(roles))}"
            )

    def _micro_batch(self) -> int:
        world, size = self.acc.num_processes, self.cfg.batch_size
        micro = self.cfg.micro_batch or max(1, size // world)
        if size % (world * micro):
            raise ValueError(
                f"train.batch_size={size} is not a multiple of processes x micro_batch = "
                f"{world} x {micro}. Change train.batch_size or train.micro_batch."
            )
        return micro

    def _role(
        self,
        name: str,
        module: nn.Module,
        optim: Mapping[str, OptimConfig],
        ema: Mapping[str, EmaConfig],
    ) -> Role:
        cfg = optim_of(name, optim)
        params = [p for _, p in trainable(module)]
        if self.acc.num_processes > 1:
            refuse_shards(name, params)
        kind = {"adamw": torch.optim.AdamW, "muon": Muon}[cfg.name]
        optimizer = kind(
            params, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps,
            weight_decay=cfg.weight_decay, fused=True,
        )  # fmt: skip
        if self.acc.num_processes > 1:
            for tensor in (*params, *module.buffers()):
                torch.distributed.broadcast(tensor.data, 0)
        role = Role(module, optimizer, cfg, params)
        role.total = max(1, sum(self.count(u) for u in self.updates if name in u.trains))
        if name in self.method.students:
            role.ema = {key: Ema(value, module) for key, value in ema.items()}
        return role

    def count(self, update: Update) -> int:
        """How often an update runs in the whole run."""
        stop = min(self.cfg.steps, update.stop if update.stop is not None else self.cfg.steps)
        first = update.start + (update.offset - update.start) % update.every
        return max(0, -(-(stop - first) // update.every)) * update.repeat

    # ---- the loop -----------------------------------------------------------------------

    def fit(self, callbacks: tuple[Every, ...] = ()) -> None:
        """Train from the newest complete checkpoint (if any) to `train.steps`."""
        if self.checkpoints is not None:
            self.checkpoints.resume(self)
        if self.tracker is not None:
            self.tracker.rewind(self.step)
        if self.step == 0:
            self._call([c for c in callbacks if c.at_start])
            self.earlier_passes -= self.passes  # nor is probing
        else:
            self._call(self._due(callbacks))  # the end of the earlier process may have cut them off
        previous = self._listen()
        bar = tqdm(
            total=self.cfg.steps, initial=self.step, unit="step", dynamic_ncols=True,
            disable=None if self.acc.is_main_process else True, desc="train",
        )  # fmt: skip
        mean: dict[str, list[Tensor]] = {}
        started, since, stop = time.perf_counter(), (self.step, self.seconds), False
        try:
            while self.step < self.cfg.steps and not stop:
                for name, value in self.train_step().items():
                    mean.setdefault(name, []).append(value)
                bar.update()
                last, stop = self.step == self.cfg.steps, self._asked_to_stop()
                if self.step % self.log_every == 0 or last:
                    self.seconds += time.perf_counter() - started
                    rate = (self.step - since[0]) / (self.seconds - since[1])
                    self._log(mean, rate, bar)
                    mean, since = {}, (self.step, self.seconds)
                    started = time.perf_counter()
                due = self.checkpoint_every and self.step % self.checkpoint_every == 0
                calls = self._due(callbacks)
                if due or last or stop or calls:
                    self.seconds += time.perf_counter() - started
                    if self.checkpoints is not None and (due or last or stop):
                        self.checkpoints.save(self)
                    self._call(calls)
                    started = time.perf_counter()
        finally:
            bar.close()
            for kind, handler in previous.items():
                signal.signal(kind, handler)

    def _due(self, callbacks: Sequence[Every]) -> list[Every]:
        """Those of this step: all of them at the last one."""
        last = self.step == self.cfg.steps
        return [c for c in callbacks if last or (c.every and self.step % c.every == 0)]

    def _call(self, callbacks: Sequence[Every]) -> None:
        passes = self.passes
        for callback in callbacks:
            callback.fn(self)
        self._frozen_for = None  # callbacks may have changed the networks' mode
        self.earlier_passes += passes - self.passes  # pictures are not training

    def train_step(self) -> dict[str, Tensor]:
        """One engine step: every update that is due. Returns detached, unreduced losses."""
        for transition in self.transitions:
            if transition.at == self.step:
                self._move(transition)
        logs: dict[str, Tensor] = {}
        shared = self._micro_batches(0)
        for index, update in enumerate(self.updates):
            if not self.due(update):
                continue
            self._unfreeze_only(update.trains)
            for repeat in range(update.repeat):
                batches = shared if repeat == 0 else self._micro_batches(repeat)
                self._run(update, index, repeat, batches, logs)
        self.step += 1
        return logs

    def due(self, update: Update) -> bool:
        """Whether the update runs in the current step."""
        return (
            self.step % update.every == update.offset
            and self.step >= update.start
            and (update.stop is None or self.step < update.stop)
        )

    def _run(
        self, update: Update, index: int, repeat: int, batches: list[Batch], logs: dict[str, Tensor]
    ) -> None:
        for k, batch in enumerate(batches):
            rank = self.acc.process_index
            torch.manual_seed(step_seed(self.cfg.seed, self.step, index, repeat, k, rank))
            if batch.shared is not None:
                batch.shared.manual_seed(step_seed(self.cfg.seed, self.step, index, repeat, k))
            losses = update.loss(batch)
            total = sum(v for n, v in losses.items() if not n.startswith("_"))
            self.acc.backward(total / len(batches))
            for name, value in losses.items():
                key = f"{update.name}/{name.lstrip('_')}"
                logs[key] = logs.get(key, 0) + value.detach() / (len(batches) * update.repeat)
        for name in update.trains:
            self._optimizer_step(name, logs)
        if update.after is not None:
            with torch.no_grad():
                update.after()

    def _optimizer_step(self, name: str, logs: dict[str, Tensor]) -> None:
        role = self.roles[name]
        self._average_gradients(role)
        norm = torch.nn.utils.clip_grad_norm_(role.params, role.cfg.clip or math.inf)
        logs[f"{name}/grad_norm"] = norm.detach()
        if torch.isfinite(norm):
            for group in role.optimizer.param_groups:
                group["lr"] = self.lr(role)
            role.optimizer.step()
            for ema in role.ema.values():
                ema.update(role.module, role.updates, self.cfg.batch_size)
            role.updates += 1
            role.skipped_in_row = 0
        else:
            role.skipped += 1
            role.skipped_in_row += 1
        role.optimizer.zero_grad(set_to_none=True)
        if role.skipped_in_row >= self.cfg.max_skipped:
            losses = {k: float(v) for k, v in logs.items()}
            raise NonFinite(
                f"{role.skipped_in_row} updates in a row of role {name!r} had non-finite "
                f"gradients, the last at step {self.step}. Losses: {losses}. To reproduce: "
                f"train.seed={self.cfg.seed}, resume from the last checkpoint, look at step "
                f"{self.step}. Try a lower optim.{name}.lr or precision.dtype=fp32."
            )

    def _average_gradients(self, role: Role) -> None:
        if self.acc.num_processes == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in role.params]
        used = torch.tensor([float(p.grad is not None) for p in role.params]).to(grads[0])
        flat = torch.cat([*(g.reshape(-1) for g in grads), used])
        torch.distributed.all_reduce(flat)
        flat /= self.acc.num_processes
        *flats, used = flat.split([*(g.numel() for g in grads), len(grads)])
        for p, g, n in zip(role.params, flats, used.tolist(), strict=True):
            # fused AdamW reads raw memory: a gradient must have its parameter's layout
            p.grad = torch.empty_like(p).copy_(g.view(p.shape)) if n else None

    def lr(self, role: Role) -> float:
        """Learning rate of the next update: a pure function of the role's updates done."""
        cfg, n = role.cfg, role.updates
        warm = min(1.0, (n + 1) / cfg.warmup) if cfg.warmup else 1.0
        done = min(1.0, n / role.total)
        shape = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * done),
        }
        return cfg.lr * warm * (cfg.final + (1 - cfg.final) * shape[cfg.decay])

    def _micro_batches(self, draw: int) -> list[Batch]:
        per_rank = self.cfg.batch_size // self.acc.num_processes
        first = self.acc.process_index * per_rank
        starts = range(first, first + per_rank, self.micro)
        size = self.cfg.batch_size
        rows = (range(s, s + self.micro) for s in starts)
        return [replace(self.stream.batch(self.step, draw, r, size), step=self.step) for r in rows]

    def _unfreeze_only(self, trains: tuple[str, ...]) -> None:
        if trains == self._frozen_for:
            return
        for name, role in self.roles.items():
            on = name in trains
            role.module.train(on)
            for p in role.params:
                p.requires_grad_(on)
        self._frozen_for = trains

    @torch.no_grad()
    def _move(self, transition) -> None:
        role = None if transition.source == "teacher" else self.roles[transition.source]
        source = self.method.teacher if role is None else role.module
        target = self.roles[transition.to]
        averages = list(role.ema.values())[:1] if role is not None and transition.averaged else []
        for ema in averages:
            ema.swap(source)
        if transition.copy is not None:
            transition.copy(source, target.module)
        else:
            values = dict(source.named_parameters())
            for name, p in trainable(target.module):
                p.copy_(values[name])
        for ema in averages:
            if role is target:  # it keeps what it took
                ema.load(dict(trainable(source)))
            else:
                ema.swap(source)
        if transition.reset_optimizer:
            target.optimizer.state.clear()
            for ema in target.ema.values():
                ema.load(dict(trainable(target.module)))

    # ---- reporting ----------------------------------------------------------------------

    @property
    def images(self) -> int:
        return self.step * self.cfg.batch_size

    @property
    def passes(self) -> int:
        """Network evaluations so far in samples, over all networks, restarts and processes."""
        modules = [self.method.__dict__.get("teacher"), *(r.module for r in self.roles.values())]
        own = sum(getattr(m, "passes", 0) for m in modules)
        return self.earlier_passes + own * self.acc.num_processes

    def _log(self, mean: Mapping[str, list[Tensor]], rate: float, bar: tqdm) -> None:
        row = {k: torch.stack([v.float() for v in vs]).mean() for k, vs in mean.items()}
        if self.acc.num_processes > 1 and row:
            stacked = self.acc.reduce(torch.stack(list(row.values())), "mean")
            row = dict(zip(row, stacked, strict=True))
        values = {k: float(v) for k, v in row.items()}
        short = {k.split("/")[-1]: f"{v:.3g}" for k, v in values.items() if "grad_norm" not in k}
        if skipped := sum(role.skipped for role in self.roles.values()):
            short["skipped"] = str(skipped)
        bar.set_postfix(short | {"img/s": f"{rate * self.cfg.batch_size:.0f}"}, refresh=False)
        for name, role in self.roles.items():
            values[f"{name}/updates"] = role.updates
            values[f"{name}/lr"] = self.lr(role)
            if role.skipped:
                values[f"{name}/skipped"] = role.skipped
        values |= {"images": self.images, "images_per_s": rate * self.cfg.batch_size}
        self.latest = values
        if self.tracker is not None:
            self.tracker.log(self.step, values | {"seconds": self.seconds})

    def _asked_to_stop(self) -> bool:
        """Whether any process got a signal to stop; all of them must leave after the same step."""
        if self.acc.num_processes > 1:
            flag = torch.tensor(int(self.preempted), device=self.acc.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.preempted |= bool(flag)
            return bool(flag)  # not `preempted`: a signal may have come in after the reduction
        return self.preempted

    def _listen(self):
        """SIGTERM (preemption) and a first Ctrl-C: finish the step, save, return.

        Returns the handlers that stood before.
        """

        def stop(kind, _frame):
            self.preempted = True
            if kind == signal.SIGINT:
                signal.signal(kind, signal.default_int_handler)  # a second one stops at once

        if threading.current_thread() is not threading.main_thread():
            return {}
        kinds = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in the background
            kinds.append(signal.SIGINT)
        return {kind: signal.signal(kind, stop) for kind in kinds}
