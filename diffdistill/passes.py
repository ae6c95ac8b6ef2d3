"""What a run costs in network passes, known before it is trained.

A pass is one sample through a network of the teacher's size, forwards (`Denoiser.passes`): a guided
call counts twice, partial passes for discriminator features count, backward passes do not. Of
autoregressive networks every call counts, for one group of tokens as for all of them.
Making teacher pairs counts, too, although they are stored.

What an engine step costs follows from the updates that are due and from what they draw with
`Batch.randint` (the index of a few-step student's step). These draws are replayed for every step;
a step with a combination that was not seen before is taken once, on a few records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator

from diffdistill.config import RunConfig
from diffdistill.data import prepare
from diffdistill.data.stream import TensorStream
from diffdistill.engine import Engine, step_seed
from diffdistill.method import Batch, Losses, Update
from diffdistill.registry import get_method
from diffdistill.run import check_needs, make_roles
from diffdistill.teachers import Teacher

RECORDS = 8  # conditions and images of a dry engine

Draws = tuple[tuple[int, int], ...]  # (n, value) of each randint on a micro-batch
Call = tuple[tuple[int, ...], int, bool]  # updates due in the step, which one, fresh micro-batch?


def dry_engine(cfg: RunConfig, teacher: Teacher, accelerator: Accelerator) -> Engine:
    """The engine of a run, on a few records and random teacher pairs. It is never kept."""
    cls, few, denoiser = get_method(cfg.method_name), RECORDS, teacher.denoiser
    needs = cls.needs(cfg.method)
    check_needs(cfg.method_name, needs, teacher)
    denoiser.to(accelerator.device)
    torch.manual_seed(cfg.train.seed)
    method = cls(cfg.method, denoiser)
    made = prepare.stream(
        replace(cfg.data, size=min(few, cfg.data.size or few)), teacher, replace(needs, pairs=0),
        guidance=1.0, seed=0, device=accelerator.device,
    )  # fmt: skip
    eps = torch.randn(made.size, *denoiser.shape)
    tokens = teacher.family == "tokens"
    ends = torch.zeros(eps.shape[:2], dtype=torch.int32) if tokens else torch.randn_like(eps)
    pairs = (eps, ends, made.cond) if needs.pairs else None
    stream = TensorStream(
        made.size, denoiser.shape, made.cond, x=made.x, pairs=pairs, prompts=made.prompts,
        device=accelerator.device,
    )  # fmt: skip
    roles = make_roles(method, denoiser, cfg.lora)
    for module in roles.values():
        module.to(accelerator.device)
    method.attach(roles)
    train = replace(cfg.train, max_skipped=10**9)  # what it learns does not matter
    return Engine(
        method, roles, stream, train=train, optim=cfg.optim, ema={}, accelerator=accelerator
    )


def of_pairs(cfg: RunConfig, teacher: Teacher) -> int:
    """Passes for the stored trajectories that the method asks for, in whole shards."""
    needs = get_method(cfg.method_name).needs(cfg.method)
    if not needs.pairs:
        return 0
    net, guidance = teacher.denoiser, getattr(cfg.method, "guidance", 1.0)
    _, solve = prepare.pair_solver(teacher, guidance, needs.pair_steps)
    one = torch.zeros(1, *net.shape, device=next(net.parameters()).device)
    before = net.passes
    solve(one, net.null_cond(one))
    shards = math.ceil(needs.pairs / prepare.PAIRS_PER_SHARD)
    return shards * prepare.PAIRS_PER_SHARD * (net.passes - before)


@dataclass(frozen=True)
class _Heard(Batch):
    """A micro-batch that notes what is drawn."""

    fresh: bool = False
    drawn: list[tuple[int, int]] = field(default_factory=list)

    def randint(self, n: int) -> int:
        value = super().randint(n)
        self.drawn.append((n, value))
        return value


class Counter:
    """Passes of each step of a (dry) engine, for any seed."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._cost: dict[tuple[Call, Draws], int] = {}
        self._next: dict[tuple[Call, Draws], int] = {}  # n of the draw that follows
        self._due: tuple[int, ...] = ()
        self._loss = [u.loss for u in engine.updates]
        engine.updates = tuple(
            replace(u, loss=self._listen(i, u)) for i, u in enumerate(engine.updates)
        )
        stream, self._batches = engine.stream, engine.cfg.batch_size // engine.micro

        class Heard:
            def batch(self, step: int, draw: int, rows: range, batch_size: int) -> Batch:
                batch = stream.batch(step, draw, rows, batch_size)
                return _Heard(**vars(batch), fresh=draw > 0)

        engine.stream = Heard()

    def steps(self, seed: int) -> Iterator[int]:
        """Passes of step 0, 1, 2, ... of a run with this train.seed."""
        step = 0
        while True:
            yield self.step(step, seed)
            step += 1

    def step(self, step: int, seed: int) -> int:
        engine = self.engine
        engine.step = step
        self._due = tuple(i for i, u in enumerate(engine.updates) if engine.due(u))
        known = self._replay(step, seed)
        if known is None:
            engine.cfg = replace(engine.cfg, seed=seed)
            engine.train_step()
            known = self._replay(step, seed)
        assert known is not None, "draws of a step cannot be replayed"
        return known

    def _listen(self, index: int, update: Update) -> Callable[[Batch], Losses]:
        def loss(batch: Batch) -> Losses:
            assert isinstance(batch, _Heard)
            start, before = len(batch.drawn), self.engine.passes
            losses = update.loss(batch)
            call = self._due, index, batch.fresh
            for i in range(start, len(batch.drawn)):
                self._next[call, tuple(batch.drawn[:i])] = batch.drawn[i][0]
            self._cost[call, tuple(batch.drawn)] = self.engine.passes - before
            return losses

        return loss

    def _replay(self, step: int, seed: int) -> int | None:
        """Passes of a step, or None if something in it was never seen."""
        total, rng = 0, torch.Generator()
        shared: list[Draws] = [()] * self._batches
        for index in self._due:
            for repeat in range(self.engine.updates[index].repeat):
                call = self._due, index, repeat > 0
                for k in range(self._batches):
                    drawn = shared[k] if repeat == 0 else ()
                    rng.manual_seed(step_seed(seed, step, index, repeat, k))
                    while (n := self._next.get((call, drawn))) is not None:
                        drawn += ((n, int(torch.randint(n, (), generator=rng))),)
                    if (call, drawn) not in self._cost:
                        return None
                    total += self._cost[call, drawn]
                    if repeat == 0:
                        shared[k] = drawn
        return total
