"""Signs that a run goes wrong, each said once while it trains."""

from __future__ import annotations

from collections import Counter

import torch
from tqdm import tqdm

from diffdistill.engine import Engine, Role

STILL = 20  # updates after which weights must have moved
SURE, LINES = 0.99, 5  # a discriminator that is right this often, in so many lines of the log
NARROW, WIDE = 0.3, 3.0  # spread of the student's samples, over that of the teacher's


class Signs:
    """Looks at the engine after every line of its log."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.first: dict[str, tuple[int, float]] = {}  # of each role: updates, sum of the weights
        self.sure: Counter[str] = Counter()

    def __call__(self, engine: Engine) -> None:
        for name, role in engine.roles.items():
            self._still(name, role)
        for key, value in engine.latest.items():
            if key.endswith("/accuracy"):
                self.sure[key] = self.sure[key] + 1 if value >= SURE else 0
                if self.sure[key] >= LINES:
                    self.say(
                        key,
                        f"{key} is {value:.2f}: the discriminator tells every sample from data, "
                        "so its gradient teaches no more. Lower optim.discriminator.lr, or look "
                        "whether samples and data have the same range (samples/)",
                    )

    def spread(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Compare the standard deviations of images from the same noise, [N, C, H, W]."""
        ratio = float(student.float().std() / teacher.float().std().clamp_min(1e-12))
        if not NARROW <= ratio <= WIDE:
            self.say(
                "spread",
                f"the spread of the student's samples is {ratio:.2g} times the teacher's (samples/)"
                ". Early in a run that may pass; if it stays, lower optim.student.lr",
            )

    def say(self, sign: str, text: str) -> None:
        """Say it, but a sign no second time in this process."""
        if sign not in self.said:
            self.said.add(sign)
            tqdm.write(f"warning: {text}")

    def _still(self, name: str, role: Role) -> None:
        if name in self.first and self.first[name][0] < 0:
            return  # it moves
        total = sum(float(p.detach().double().sum()) for p in role.params)
        start, before = self.first.setdefault(name, (role.updates, total))
        if total != before:
            self.first[name] = (-1, 0.0)
        elif role.updates - start >= STILL:
            self.say(
                name,
                f"the weights of {name} are the same after {role.updates - start} updates: its "
                f"learning rate is too small for their precision (optim.{name}.lr), or its loss "
                "does not reach them",
            )
