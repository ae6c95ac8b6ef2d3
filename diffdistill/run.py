"""One run from configuration to student and report; every command and `distill` go through here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from diffdistill import identity, memory, runtime
from diffdistill.checkpoint import Checkpoints
from diffdistill.config import RunConfig, fingerprint
from diffdistill.data import prepare
from diffdistill.denoiser import Denoiser, Runtime
from diffdistill.engine import Engine, Every
from diffdistill.errors import writable
from diffdistill.eval.records import evaluations
from diffdistill.finish import command, finish, further_samplers, judging
from diffdistill.launch import launched, set_threads
from diffdistill.method import Batch, Method, Needs
from diffdistill.parts.lora import lora_copy
from diffdistill.pipelines.loading import bare
from diffdistill.previews import sample_grids
from diffdistill.registry import get_method
from diffdistill.signs import Signs
from diffdistill.teachers import Teacher, load_teacher
from diffdistill.tokens import TokenModel
from diffdistill.tracking import Tracker


@dataclass(frozen=True)
class Result:
    """What a finished (or preempted) run leaves behind."""

    folder: Path
    student: Path
    done: bool
    evaluation: dict[str, Any] | None = field(default=None, repr=False)
    module: nn.Module | None = None  # the averaged student, if the teacher was a `Denoiser`


def execute(
    cfg: RunConfig,
    provenance: Mapping[str, str] | None = None,
    *,
    teacher: Any = None,
    argv: list[str] | None = None,
) -> Result:
    """Train (or continue), export, evaluate, report. `teacher` overrides cfg.teacher.name."""
    folder = writable(Path(cfg.run.root) / (cfg.run.name or "run"), "run.root=DIR")
    identity.refuse_another_run(folder, cfg)
    if (folder / "DONE").is_file():
        given = None if isinstance(teacher, str | Path | None) else load_teacher(teacher)
        if given:
            identity.refuse_another_teacher(folder, given)
        further = f"To judge it in another way: diffdistill evaluate {folder}/student"
        if given and given.family == "module":
            further = bare(folder / "student")
        print(f"{folder} is finished; remove it or set run.name to train again. {further}")
        module = _module(cfg, given, folder) if given and given.family == "module" else None
        missing = cfg.report and not (folder / "report" / "index.html").is_file()
        if missing and module is None and launched().is_main_process:
            _report(folder)  # all that follows DONE was cut off
            (folder / "FAILED").unlink(missing_ok=True)
        return Result(folder, folder / "student", True, _last_evaluation(folder), module)
    accelerator = launched()
    set_threads(cfg.threads, accelerator)
    main = accelerator.is_main_process
    cls = get_method(cfg.method_name)
    needs = cls.needs(cfg.method)
    loaded = load_teacher(teacher if teacher is not None else cfg.teacher.name)
    identity.refuse_another_teacher(folder, loaded)
    check_needs(cfg.method_name, needs, loaded)
    further_samplers(cfg, loaded)  # refuses times that do not fall
    if main:
        identity.record(folder, cfg, provenance or {}, argv or sys.argv, loaded.key)
        (folder / "FAILED").unlink(missing_ok=True)
    tracker = Tracker(folder, wandb=cfg.log.wandb, config=asdict(cfg)) if main else None
    engine = None
    try:
        engine = build(cfg, cls, needs, loaded, folder, accelerator, tracker)
        late = unreached(engine)
        if main:
            print(f"{cfg.method_name} on {loaded.name}: {folder}")
            how = runtime.describe(loaded.denoiser.runtime)
            print(f"execution: {how}, {torch.get_num_threads()} threads")
            print(late + unsound(engine, loaded) + unjudged(cfg, loaded, folder), end="")
        started = time.perf_counter()
        signs = Signs()
        calls = sample_grids(cfg, engine, loaded, tracker, signs)
        if main:
            calls += (Every(cfg.log.every, signs, at_start=False),)
        if main and cfg.evaluate.every and loaded.info.get("protocol"):
            calls += (judging(cfg, loaded, folder, argv or sys.argv),)
        engine.fit(calls)
        if engine.preempted and engine.step < cfg.train.steps:
            print(f"stopped at step {engine.step}; the same command continues")
            return Result(folder, folder / "student", False)
        evaluation = None
        if main:
            evaluation = finish(cfg, engine, loaded, folder, argv or sys.argv)
            done = {"steps": engine.step, "seconds_of_this_start": time.perf_counter() - started}
            (folder / "DONE").write_text(json.dumps(done) + "\n")
            if cfg.report and loaded.family != "module":
                _report(folder)
            print(unjudged(cfg, loaded, folder), end="")
        accelerator.wait_for_everyone()
        module = _module(cfg, loaded, folder) if loaded.family == "module" else None
        return Result(folder, folder / "student", True, evaluation, module)
    except Exception as error:
        if memory.exhausted(error):
            if main and engine is not None:
                print("\n".join(memory.networks(engine)))
            error = ValueError(memory.advice(cfg, engine))
        if main:
            again = command(loaded, argv or sys.argv)
            note = f"{type(error).__name__}: {error}\nto reproduce: {again}\n"
            (folder / "FAILED").write_text(note)
        raise error
    finally:
        if tracker is not None:
            tracker.close()


def build(
    cfg: RunConfig,
    cls: type[Method],
    needs: Needs,
    teacher: Teacher,
    folder: Path,
    accelerator: Accelerator,
    tracker: Tracker | None = None,
) -> Engine:
    """The engine of a run, before its first step."""
    device = accelerator.device
    teacher.denoiser.to(device)
    teacher.device = device
    if teacher.family == "tokens":
        teacher.pipe.tokenizer.to(device)
    torch.manual_seed(cfg.train.seed)  # random heads start alike on every process
    method = cls(cfg.method, teacher.denoiser)
    with accelerator.main_process_first():  # the others find the cache filled
        stream = prepare.stream(
            cfg.data, teacher, needs, guidance=getattr(cfg.method, "guidance", 1.0),
            seed=cfg.train.seed, device=device,
        )  # fmt: skip
    per_process = cfg.train.micro_batch or max(1, cfg.train.batch_size // accelerator.num_processes)
    probe = stream.batch(0, 0, range(per_process), cfg.train.batch_size)
    chosen = chosen_runtime(cfg, teacher.denoiser, probe, folder, accelerator)
    runtime.apply(teacher.denoiser, chosen)
    roles = make_roles(method, teacher.denoiser, cfg.lora)
    for module in roles.values():
        module.to(device)
    method.attach(roles)
    checkpoints = Checkpoints(
        folder / "checkpoints", fingerprint=fingerprint(cfg), keep=cfg.checkpoint.keep,
        main=accelerator.is_main_process,
    )  # fmt: skip
    return Engine(
        method, roles, stream, train=cfg.train, optim=cfg.optim, ema=cfg.ema,
        accelerator=accelerator, tracker=tracker, checkpoints=checkpoints,
        checkpoint_every=cfg.checkpoint.every, log_every=cfg.log.every,
    )  # fmt: skip


def make_roles(
    method: Method, teacher: Denoiser | TokenModel, lora: Mapping[str, int] | None = None
) -> dict[str, nn.Module]:
    """Build every trained network as the method asks for it.

    lora: ranks of adapters that are trained in place of whole networks, by role; "student" is
        every student. An adapted copy of the teacher shares its storage.
    """
    inits, asked = method.roles(), lora or {}
    ranks = {role: rank for role, rank in asked.items() if rank}
    moved = {role for move in method.transitions() for role in (move.source, move.to)}
    able = [r for r in inits if r in method.students or (r == "fake_score" and r not in moved)]
    if refused := sorted(ranks.keys() - {*able, "student"}):
        why = "gets whole weights" if refused[0] in inits else "is not there"
        raise ValueError(
            f"lora.{refused[0]}: with {type(method).__name__} that network {why}. Allowed: "
            f"{', '.join(able)}"
        )
    if ranks and isinstance(teacher, TokenModel):
        raise ValueError(
            f"lora={ranks}: networks of autoregressive teachers get new layers, so there is no "
            "adapter form. Leave it out"
        )
    roles: dict[str, nn.Module] = {}
    for name, init in inits.items():
        own = None if isinstance(init, str) else init(teacher)
        rank = asked.get(name, asked.get("student", 0) if name in method.students else 0)
        if rank:
            base = teacher if own is None else own
            if not isinstance(base, Denoiser) or getattr(base, "trainable_names", None):
                raise ValueError(
                    f"lora.{name}={rank}: this method builds that network itself, not as a copy "
                    f"of the teacher. Set lora.{name}=0"
                )
            roles[name] = lora_copy(base, rank, rank, "attention", gaussian=True)
        else:
            roles[name] = teacher.clone() if own is None else own
    return roles


def check_needs(name: str, needs: Needs, teacher: Teacher) -> None:
    """What can be known before anything runs."""
    kind = "tokens" if teacher.family == "tokens" else "denoiser"
    if needs.teacher != kind:
        words = {"denoiser": "diffusion or flow", "tokens": "autoregressive"}
        raise ValueError(
            f"method {name!r} distils {needs.teacher} teachers ({words[needs.teacher]}), but "
            f"{teacher.name!r} is of family {teacher.family!r}. `diffdistill list methods` says "
            "what each method needs."
        )
    if needs.features and teacher.denoiser.feature_layer is None:
        raise ValueError(
            f"method {name!r} with these options reads discriminator features, but teacher "
            f"{teacher.name!r} names no feature_layer. Set method.gan=0, or wrap the network as "
            "diffdistill.Denoiser(..., feature_layer=...)."
        )


def chosen_runtime(
    cfg: RunConfig,
    denoiser: Denoiser | TokenModel,
    probe: Batch,
    folder: Path,
    accelerator: Accelerator,
) -> Runtime:
    """Measured once per run on the main process, stored, and reused on resume."""
    file = folder / "runtime.json"
    if accelerator.is_main_process and not file.is_file():
        best, seconds = runtime.choose(denoiser, probe, cfg.precision)
        stored = {"runtime": asdict(best), "seconds": seconds, "threads": torch.get_num_threads()}
        aside = file.with_suffix(".partial")
        aside.write_text(json.dumps(stored, indent=1))
        aside.replace(file)
    accelerator.wait_for_everyone()
    return Runtime(**json.loads(file.read_text())["runtime"])


def unreached(engine: Engine) -> str:
    """A line on stages that begin after the last step.

    Raises:
        ValueError: among them is all training of a student.
    """
    steps, begins = engine.cfg.steps, {}
    for update in engine.updates:
        if not engine.count(update):
            begins[f"update {update.name!r}"] = update.start
    for move in engine.transitions:
        if move.at >= steps:
            begins[f"{move.source} -> {move.to}"] = move.at
    for name in engine.method.students:
        if not any(engine.count(u) for u in engine.updates if name in u.trains):
            first = min(u.start for u in engine.updates if name in u.trains)
            raise ValueError(
                f"train.steps={steps}, but {name} trains from step {first} on only. Set more "
                "train.steps, or shorter stages before it (options of this method)"
            )
    late = ", ".join(f"{what} at step {at}" for what, at in begins.items())
    return f"train.steps={steps} ends before: {late}\n" if late else ""


def unsound(engine: Engine, teacher: Teacher) -> str:
    """A line on a teacher that does not denoise the data of this run."""
    if teacher.family == "tokens":
        return ""
    from diffdistill.teachers.check import undenoised

    batch = engine.stream.batch(0, 0, range(min(4, engine.cfg.batch_size)), engine.cfg.batch_size)
    clean = batch.pair if batch.pair is not None and batch.x is None else batch
    return undenoised(teacher, clean.x, clean.cond, engine.acc.device)


def unjudged(cfg: RunConfig, teacher: Teacher, folder: Path) -> str:
    """A line on what the run leaves out although its configuration asks for it, and why."""
    asked = cfg.evaluate.at_end or cfg.evaluate.every
    if teacher.family == "module" and (asked or cfg.report):
        return "no evaluation, no report: the teacher is a bare network, and they need a pipeline\n"
    if teacher.info.get("protocol") or not asked:
        return ""
    from diffdistill.eval.protocols import unnamed

    return f"no evaluation: {unnamed(teacher.name, f'diffdistill evaluate {folder}/student')}\n"


def _module(cfg: RunConfig, teacher: Teacher, folder: Path) -> nn.Module:
    """The student of a module teacher as it was saved; several experts: a ModuleList."""
    method = get_method(cfg.method_name)(cfg.method, teacher.denoiser)
    roles = make_roles(method, teacher.denoiser, cfg.lora)
    for name in method.students:
        file = folder / "student" / f"{name}.safetensors"
        roles[name].net.load_state_dict(load_file(file))
    students = [roles[name].eval().requires_grad_(False) for name in method.students]
    return students[0] if len(students) == 1 else nn.ModuleList(students)


def _report(folder: Path) -> None:
    from diffdistill.eval.report import write_report

    print(f"report: {write_report([folder])}")


def _last_evaluation(folder: Path) -> dict[str, Any] | None:
    own = evaluations(folder)[0]
    return own[max(own)] if own else None
