"""One run from configuration to student and report; every command and `distill` go through here."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill import identity, runtime
from diffdistill.card import write_card
from diffdistill.checkpoint import Checkpoints
from diffdistill.config import RunConfig, fingerprint
from diffdistill.data import fashion, prepare, shapes
from diffdistill.data.images import to_uint8
from diffdistill.denoiser import Denoiser, Runtime
from diffdistill.engine import Engine, Every
from diffdistill.errors import writable
from diffdistill.eval.records import evaluations, on_screen
from diffdistill.method import Batch, Method, Needs, Sampler, TokenSampler
from diffdistill.parts import autoregressive
from diffdistill.parts.lora import lora_copy
from diffdistill.parts.rollout import sample
from diffdistill.pipelines.loading import STOCK, bare
from diffdistill.registry import get_method
from diffdistill.teachers import Teacher, load_teacher
from diffdistill.tokens import TokenModel
from diffdistill.tracking import PICTURES, Tracker

PREVIEWS = 24  # samples in a grid
SHARDING = {  # what `accelerate launch` exports for it
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}  # fmt: skip


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
    try:
        engine = build(cfg, cls, needs, loaded, folder, accelerator, tracker)
        late = unreached(engine)
        if main:
            print(f"{cfg.method_name} on {loaded.name}: {folder}")
            how = runtime.describe(loaded.denoiser.runtime)
            print(f"execution: {how}, {torch.get_num_threads()} threads")
            print(late + unsound(engine, loaded) + unjudged(cfg, loaded, folder), end="")
        started = time.perf_counter()
        calls = callbacks(cfg, engine, loaded, tracker)
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
        if main:
            again = command(loaded, argv or sys.argv)
            note = f"{type(error).__name__}: {error}\nto reproduce: {again}\n"
            (folder / "FAILED").write_text(note)
        raise
    finally:
        if tracker is not None:
            tracker.close()


def _report(folder: Path) -> None:
    from diffdistill.eval.report import write_report

    print(f"report: {write_report([folder])}")


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


# ---- pictures ---------------------------------------------------------------------------


def preview_conditions(teacher: Teacher, stream: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """The same conditions in every grid: the protocol's first ones, else the data's first."""
    world = teacher.info.get("world")
    if world == "shapes" and teacher.conditions == "prompts":
        conditions: list[Any] = [shapes.scene(i, "test").caption for i in range(PREVIEWS)]
        return conditions, dict(teacher.encode(conditions))
    if world == "fashion":
        conditions = [i % len(fashion.CLASSES) for i in range(PREVIEWS)]
        return conditions, dict(teacher.encode(conditions))
    rows = torch.arange(PREVIEWS) % stream.size
    return [None] * PREVIEWS, {k: fn(rows) for k, fn in stream.cond.items()}


def callbacks(
    cfg: RunConfig, engine: Engine, teacher: Teacher, tracker: Tracker | None
) -> tuple[Every, ...]:
    """Sample grids from fixed noise, teacher's first; on the main process only."""
    shape = teacher.denoiser.shape
    if tracker is None or (teacher.family != "tokens" and len(shape) != 3):
        return ()
    if teacher.family == "module" and shape[0] not in PICTURES:
        print(f"no sample grids: samples of {shape[0]} channels are no pictures")
        return ()
    device = engine.acc.device
    _, cond = preview_conditions(teacher, engine.stream)
    cond = {k: v.to(device) for k, v in cond.items()}
    rng, sampler = torch.Generator().manual_seed(0), engine.method.sampler()
    noise = [
        torch.randn(PREVIEWS, *teacher.denoiser.shape, generator=rng).to(device)
        for _ in range(sampling_info(sampler)[0])
    ]

    def teacher_grid(engine: Engine) -> None:
        if teacher.family == "tokens":
            images = teacher.pipe(
                cond["label"].tolist(), latents=noise[0], output_type="pt",
                guidance_scale=float(teacher.info["guidance"]),
            ).images  # fmt: skip
            tracker.images(0, "teacher", to_uint8(2 * images - 1), 8)
            return
        steps, guidance = STOCK.get(teacher.family, (25, 1.0))
        info = {"steps": steps, "guidance": guidance} | teacher.info
        _, solve = prepare.pair_solver(teacher, float(info["guidance"]), int(info["steps"]))
        tracker.images(0, "teacher", teacher.to_images(solve(noise[0], cond)), 8)

    @torch.no_grad()
    def student_grid(engine: Engine) -> None:
        students, sampler = student_networks(engine), engine.method.sampler()
        one = students if len(students) > 1 else students[0]
        with averaged(engine):
            if isinstance(sampler, TokenSampler):
                x = autoregressive.generate(one, noise[0], cond, sampler)
            else:
                x = sample(one, students[0].schedule, noise, cond, sampler)
        tracker.images(engine.step, "student", teacher.to_images(x), 8)

    return (
        Every(cfg.train.steps, lambda e: teacher_grid(e) if e.step == 0 else None),
        Every(cfg.log.samples_every, student_grid),
    )


def judging(cfg: RunConfig, teacher: Teacher, folder: Path, argv: list[str]) -> Every:
    """The metric-vs-images curve: export and judge every so many steps."""

    def judge_now(engine: Engine) -> None:
        if engine.step < cfg.train.steps:  # the last one is judged by `finish`
            student = export(cfg, engine, teacher, folder, argv)
            judge(student, folder, engine, cfg.evaluate.n)

    return Every(cfg.evaluate.every, judge_now, at_start=False)


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


# ---- the end of a run -------------------------------------------------------------------


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


def _module(cfg: RunConfig, teacher: Teacher, folder: Path) -> nn.Module:
    """The student of a module teacher as it was saved; several experts: a ModuleList."""
    method = get_method(cfg.method_name)(cfg.method, teacher.denoiser)
    roles = make_roles(method, teacher.denoiser, cfg.lora)
    for name in method.students:
        file = folder / "student" / f"{name}.safetensors"
        roles[name].net.load_state_dict(load_file(file))
    students = [roles[name].eval().requires_grad_(False) for name in method.students]
    return students[0] if len(students) == 1 else nn.ModuleList(students)


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


def peak_memory_gib() -> float:
    """Peak of this process: device memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def launched(cpu: bool = False) -> Accelerator:
    """The processes of this launch.

    Without cpu=True those of a machine without a GPU are strangers to each other under torchrun.
    A process that ends while its group's threads run may abort, so the group is left at exit.
    Mixed precision is `precision.dtype`, whatever the launcher was told: Accelerate would scale
    losses in fp16, and the engine does not use its optimizers, which divide by that again.

    Raises:
        ValueError: the launch asks for sharded networks or for accumulated gradients. Accelerate
            shards what it prepares, and the engine has it prepare nothing, so the request would
            be lost without a word; and it would divide losses that the engine averages itself.
    """
    for flag, kind in SHARDING.items():
        if os.environ.get(flag, "").lower() in ("1", "true"):
            raise ValueError(
                f"this launch asks for {kind} ({flag}), but networks are not sharded here: every "
                "process holds all of them whole. Launch with `accelerate launch --multi_gpu` or "
                "torchrun (a saved answer of `accelerate config` may say otherwise). For less "
                "memory set lora.student and lora.fake_score, or a smaller train.micro_batch"
            )
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked != "1":
        raise ValueError(
            f"this launch asks for {asked} steps of accumulation (--gradient_accumulation_steps). "
            "Leave that out: train.batch_size is the whole batch, train.micro_batch its parts"
        )
    cpu = cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while one process evaluates
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])
    if accelerator.num_processes > 1:
        atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def set_threads(threads: int, accelerator: Accelerator) -> None:
    """Cores / local processes: `accelerate launch` exports OMP_NUM_THREADS=1 on a CPU.

    glibc gives large freed blocks back to the kernel, and every step would pay for its pages
    again: it is told to keep them.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(threads or max(1, cores // local))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _last_evaluation(folder: Path) -> dict[str, Any] | None:
    own = evaluations(folder)[0]
    return own[max(own)] if own else None
