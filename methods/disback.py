"""DisBack: distil along the path on which the teacher degrades into the untrained student.

Zhang et al., "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion
Distillation", arXiv 2408.15991. It wraps any method with a fake score (`base`).

    recording:     the fake score, a copy of the teacher, learns the untrained student's samples;
                   s_1, s_2, ... s_N are its weights after every `record_every` steps
    backtracking:  the base method, its teacher replaced by s_{N-1}, ..., s_1 for `iters_per_node`
                   steps each, then by the teacher itself; the fake score goes on from s_N

Deviations from the reference code, whose path never takes effect (snapshots are loaded under names
that do not match; the nodes are left after one interval): the path is followed to its end, and the
student starts from the teacher (`student_init` takes another). Guidance and GAN of nodes above 0
are choices, see `cfg_per_node` and `gan_from_node`.
"""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch, Method, MethodConfig, Needs, Sampler, Transition
from diffdistill.parts.options import build_config
from diffdistill.parts.path import SnapshotPath, Storage, drift, loader, recorder
from diffdistill.parts.weights import start_from
from diffdistill.registry import get_method, register_method

SHARED = ("guidance", "student_steps", "conditioning_time")  # set here, handed to the base
GAPS = ("dmd", "f_distill", "flash_dmd")  # bases whose loss `matching` is half the squared gap


@dataclass
class Config(MethodConfig):
    base: str = "dmd"  # any method with a fake score
    options: dict[str, Any] = field(default_factory=dict)  # of the base
    guidance: float = 1.0  # of the teacher, in the base's convention
    student_steps: int = 1
    conditioning_time: float | None = None
    n_snapshots: int = 4  # N; 0: the base method alone
    record_every: int = 50  # steps between snapshots; code: 100
    iters_per_node: int = 1000  # steps at each node; code
    path_storage: Storage = "full_bf16"
    path_rank: int = 16  # of lora_delta
    cfg_per_node: Literal["constant", "interpolated", "teacher_only"] = "interpolated"  # code: 1st
    gan_from_node: int = 0  # highest node with the base's GAN loss; 0: only the teacher's
    student_init: str | None = None  # folder of another student to start from
    early_switch: float = 0.0  # leave a node below this gap, see `ahead`; 0: never

    def validate(self) -> None:
        if self.n_snapshots < 0 or min(self.record_every, self.iters_per_node, self.path_rank) < 1:
            raise ValueError(
                f"method.n_snapshots={self.n_snapshots}, record_every={self.record_every}, "
                f"iters_per_node={self.iters_per_node}, path_rank={self.path_rank}. Allowed: 0 or "
                "more snapshots, the others 1 or more"
            )
        if not 0 <= self.gan_from_node < max(1, self.n_snapshots):
            raise ValueError(
                f"method.gan_from_node={self.gan_from_node}. Allowed: 0 to n_snapshots - 1"
            )
        if get_method(self.base) is DisBack:
            raise ValueError("method.base=disback cannot wrap itself. Name another method.")
        weight = self.options.get("matching", 1.0)
        if self.early_switch and (self.base not in GAPS or weight != 1):
            raise ValueError(
                f"method.early_switch={self.early_switch} reads the gap from the loss `matching`, "
                f"given base={self.base} with weight {weight}. Allowed: {', '.join(GAPS)} with "
                "weight 1. Set method.early_switch=0 or one of these"
            )
        self.inner().validate()

    def inner(self, node: int = 0) -> MethodConfig:
        """The base's config while a node is the target."""
        cls = get_method(self.base).Config
        known, default = {f.name for f in fields(cls)}, Config()
        for name in SHARED:
            if name not in known and getattr(self, name) != getattr(default, name):
                raise ValueError(f"method.{name} is not an option of method.base={self.base}")
        given = {k: getattr(self, k) for k in SHARED if k in known}
        if twice := sorted(set(given) & set(self.options)):
            raise ValueError(f"method.options has {twice}. Set method.{twice[0]} instead.")
        if node and "guidance" in known:
            share = {"constant": 1, "interpolated": 1 - node / self.n_snapshots, "teacher_only": 0}
            given |= {"guidance": 1 + (self.guidance - 1) * share[self.cfg_per_node]}
        cfg = build_config(cls, self.options | given, "method.options")
        return replace(cfg, gan=0.0) if node > self.gan_from_node and "gan" in known else cfg


@register_method("disback")
class DisBack(Method):
    Config = Config
    paper = "Distribution Backtracking Builds A Faster Convergence Trajectory, arXiv 2408.15991"

    def __init__(self, cfg: Config, teacher: Denoiser):
        super().__init__(cfg, teacher)
        base = get_method(cfg.base)
        self.at_node = [base(cfg.inner(i), teacher) for i in range(cfg.n_snapshots + 1)]
        self.students = self.at_node[0].students
        if "fake_score" not in self.at_node[0].roles():
            raise ValueError(f"method.base={cfg.base} has no fake score, whose path is the method")

    @classmethod
    def needs(cls, cfg: Config) -> Needs:
        return get_method(cfg.base).needs(cfg.inner())

    def roles(self):
        roles = self.at_node[0].roles()
        if self.cfg.student_init is not None:
            roles[self.students[0]] = start_from(self.cfg.student_init)
        if self.cfg.n_snapshots > 1:  # the target is a network like the one that degrades
            roles |= {"target": roles["fake_score"], "path": self.path_of}
        return roles

    def path_of(self, teacher: Denoiser) -> SnapshotPath:
        init, c = self.at_node[0].roles()["fake_score"], self.cfg
        like = teacher if init == "teacher" else init(teacher)
        return SnapshotPath(teacher, like, c.n_snapshots - 1, c.path_storage, c.path_rank)

    def attach(self, roles) -> None:
        super().attach(roles)
        for node, method in enumerate(self.at_node):
            method.attach(roles)
            if 0 < node < self.cfg.n_snapshots:
                method.teacher = self.target

    def window(self, node: int) -> tuple[int, int | None]:
        """First step with this node as the target, and the first without; N: the recording."""
        n, c = self.cfg.n_snapshots, self.cfg
        first = n * c.record_every
        if node == n:
            return 0, first
        after = first + (n - node) * c.iters_per_node
        return after - c.iters_per_node, after if node else None

    def updates(self):
        n, updates = self.cfg.n_snapshots, []
        if n:  # no GAN here
            own = next(u for u in self.at_node[n].updates() if u.trains == ("fake_score",))
            start, stop = self.window(n)
            updates = [replace(own, loss=partial(self.recorded, own.loss), start=start, stop=stop)]
        for node in reversed(range(max(n, 1))):
            early = node > 0 and self.cfg.early_switch > 0
            own = self.at_node[0 if early else node].updates()
            if early:  # the nodes before may come sooner, with their guidance and what they train
                own = (replace(u, loss=partial(self.ahead, k)) for k, u in enumerate(own))
            updates += [v for u in own if (v := self.within(u, node))]
        return tuple(updates)

    def within(self, update, node: int):
        """A base update in the window of a node; its own start and stop count from backtracking."""
        first, (start, stop) = self.window(self.cfg.n_snapshots)[1], self.window(node)
        start = max(start, first + update.start)
        stops = [s for s in (stop, None if update.stop is None else first + update.stop) if s]
        stop = min(stops, default=None)
        if stop is not None and stop <= start:
            return None
        return replace(update, start=start, stop=stop)

    def transitions(self):
        c, n = self.cfg, self.cfg.n_snapshots
        moves, first = [], n * c.record_every
        for node in range(1, n):
            at, back = node * c.record_every, self.window(node)[0]
            moves.append(Transition(at, "fake_score", "path", copy=recorder(node)))
            moves.append(Transition(back, "path", "target", copy=loader(node)))
        return *moves, *(replace(m, at=first + m.at) for m in self.at_node[0].transitions())

    def sampler(self) -> Sampler:
        return self.at_node[0].sampler()

    def recorded(self, loss, batch: Batch):
        return {**loss(batch), "_drift": drift(self.fake_score, self.teacher)}

    def ahead(self, index: int, batch: Batch):
        """The loss of a base update at the node that is the target, the clock's or one before it.

        The student's gap, rms (D_fake - target) / mean |x - target|, may end the node. It is read
        from `matching` = 0.5 gap^2.
        """
        moves = set(self.at_node[0].updates()[index].trains) & set(self.students)
        if moves:
            self.path.early(self.cfg.early_switch, self.target)
        losses = self.at_node[int(self.path.node)].updates()[index].loss(batch)
        if moves:
            self.path.note((2 * losses["matching"].detach()).sqrt())
        return losses
