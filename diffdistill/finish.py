"""What training leaves: the student folder with its card, and its evaluations."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from diffdistill.card import write_card
from diffdistill.config import RunConfig
from diffdistill.denoiser import Denoiser
from diffdistill.engine import Engine, Every
from diffdistill.eval.records import on_screen
from diffdistill.launch import device_name, peak_memory_gib
from diffdistill.method import Sampler, TokenSampler
from diffdistill.registry import get_method
from diffdistill.teachers import Teacher
from diffdistill.tokens import TokenModel


def finish(
    cfg: RunConfig, engine: Engine, teacher: Teacher, folder: Path, argv: list[str]
) -> dict[str, Any] | None:
    """Export the student and judge it, with its own steps and with `evaluate.steps`.

    Returns the evaluation with its own steps.
    """
    evaluation = None
    for sampler in (None, *further_samplers(cfg, teacher)):
        student = export(cfg, engine, teacher, folder, argv, sampler)
        print(f"student: {student}")
        if cfg.evaluate.at_end and teacher.info.get("protocol"):
            made = judge(student, folder, engine, cfg.evaluate.n)
            evaluation = evaluation or made
    return evaluation


def further_samplers(cfg: RunConfig, teacher: Teacher) -> list[Sampler | TokenSampler]:
    """Those of `evaluate.steps`, but for the student's own number of steps."""
    cls = get_method(cfg.method_name)
    return [
        cls(replace(cfg.method, student_steps=steps), teacher.denoiser).sampler()
        for steps in sorted({*cfg.evaluate.steps})
        if steps != cfg.method.student_steps  # type: ignore[attr-defined]
    ]


def export(
    cfg: RunConfig,
    engine: Engine,
    teacher: Teacher,
    folder: Path,
    argv: list[str],
    further: Sampler | TokenSampler | None = None,
) -> Path:
    """Write the student folder with its averaged weights: student/, or that of another sampler."""
    sampler = further or engine.method.sampler()
    info = student_info(cfg, engine, teacher, argv, sampler)
    student = folder / (f"student_{info['steps']}step" if further else "student")
    with averaged(engine):
        nets = [d.net for d in student_networks(engine)]
        if teacher.family == "module":
            student.mkdir(exist_ok=True)
            for name, net in zip(engine.method.students, nets, strict=True):
                state = {k: v.detach().cpu().clone() for k, v in net.state_dict().items()}
                save_file(state, student / f"{name}.safetensors")
            (student / "diffdistill.json").write_text(json.dumps(info, indent=1))
            write_card(student, info)
            return student
        from diffdistill.export import export_student, export_token_student

        if teacher.family == "tokens":
            return export_token_student(
                student, teacher_pipe=teacher.pipe, net=nets[0], sampler=sampler, info=info,
            )  # fmt: skip
        export_student(
            student, teacher_pipe=teacher.pipe, family=teacher.family,
            weights=[net.backbone for net in nets], sampler=sampler, info=info,
        )  # fmt: skip
    return student


def judge(student: Path, folder: Path, engine: Engine, n: int | None) -> dict[str, Any]:
    """Evaluate a student folder under its protocol and add the numbers to its card."""
    how = student.name.removeprefix("student")  # "", or that of a further sampler: "_4step"
    out = folder / "eval" / f"step_{engine.step:06d}{how}.json"
    from diffdistill.eval.evaluate import evaluate
    from diffdistill.pipelines.loading import load_pipeline

    generator = load_pipeline(student, device=str(engine.acc.device))
    result = evaluate(generator, n=n, out=out)
    info = json.loads((student / "diffdistill.json").read_text())
    info["metrics"] = result["records"]
    (student / "diffdistill.json").write_text(json.dumps(info, indent=1))
    write_card(student, info)
    print(f"{out.stem}:\n{on_screen(result['records'])}", flush=True)
    return result


def judging(cfg: RunConfig, teacher: Teacher, folder: Path, argv: list[str]) -> Every:
    """The metric-vs-images curve: export and judge every so many steps."""

    def judge_now(engine: Engine) -> None:
        if engine.step < cfg.train.steps:  # the last one is judged by `finish`
            student = export(cfg, engine, teacher, folder, argv)
            judge(student, folder, engine, cfg.evaluate.n)

    return Every(cfg.evaluate.every, judge_now, at_start=False)


def student_info(
    cfg: RunConfig,
    engine: Engine,
    teacher: Teacher,
    argv: list[str],
    sampler: Sampler | TokenSampler,
) -> dict[str, Any]:
    """What the student's diffdistill.json says."""
    steps, how = sampling_info(sampler)
    own = {k: teacher.info.get(k) for k in ("world", "protocol", "licence")}
    return own | {
        "kind": "student",
        "name": f"{Path(teacher.name).name}-{cfg.method_name}-{steps}step",
        "family": teacher.family,
        "steps": steps,
        **how,
        "guidance": 0,
        "method": cfg.method_name,
        "paper": type(engine.method).paper,
        "teacher": teacher.name,
        "base_model": teacher.name if teacher.source else None,
        "teacher_weights": teacher.info.get("weights"),
        "teacher_steps": teacher.info.get("steps"),
        "teacher_guidance": getattr(cfg.method, "guidance", None),
        "data": cfg.data.name or teacher.info.get("world"),
        "command": command(teacher, argv),
        "train": {
            "steps": engine.step,
            "batch_size": cfg.train.batch_size,
            "images": engine.images,
            "seconds": round(engine.seconds, 1),
            "network_passes": engine.passes,
            "skipped": {name: r.skipped for name, r in engine.roles.items() if r.skipped},
            "peak_memory_gib": round(peak_memory_gib(), 2),
            "processes": engine.acc.num_processes,
            "device": device_name(engine.acc.device),
        },
        "metrics": [],
    }


def command(teacher: Teacher, argv: list[str]) -> str:
    """What made a run; a teacher that no name loads was given to `distill`."""
    words = [word for word in argv if "=" in word]
    if teacher.source is not None:
        return f"diffdistill train {shlex.join(words)}"
    others = shlex.join(word for word in words if not word.startswith("teacher.name="))
    return f"diffdistill.distill: teacher {others}"


def sampling_info(sampler: Sampler | TokenSampler) -> tuple[int, dict[str, Any]]:
    """Steps of a student, and what its diffdistill.json says about them."""
    if isinstance(sampler, TokenSampler):
        return len(sampler.starts), asdict(sampler) | {"starts": list(sampler.starts)}
    how = {"times": list(sampler.times), "renoise": sampler.renoise}
    experts = {"experts": list(sampler.experts)} if sampler.experts else {}
    eta = {"eta": sampler.eta} if sampler.renoise in ("tcd", "ancestral") else {}
    return len(sampler.times), how | experts | eta


def student_networks(engine: Engine) -> list[Denoiser | TokenModel]:
    """The networks that sample: one, or the experts of `Sampler.experts`."""
    modules = [engine.roles[name].module for name in engine.method.students]
    assert all(isinstance(m, Denoiser | TokenModel) for m in modules)
    return modules  # type: ignore[return-value]


class averaged:
    """Inside, the students hold their EMA weights (the first average, if any), in eval mode."""

    def __init__(self, engine: Engine):
        self.roles = [engine.roles[n] for n in engine.method.students]

    def __enter__(self) -> None:
        for role in self.roles:
            self._swap(role)
            role.module.eval()

    def __exit__(self, *_: object) -> None:
        for role in self.roles:
            self._swap(role)
        # the engine sets train and eval mode before every update

    @staticmethod
    def _swap(role: Any) -> None:
        for ema in list(role.ema.values())[:1]:
            ema.swap(role.module)
