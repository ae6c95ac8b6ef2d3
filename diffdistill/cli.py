"""The `diffdistill` command. Everything heavy is imported by the sub-command that needs it.

Exit codes: 0; 2 for the user's mistake (one line on stderr); 1 for ours (with trace).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from diffdistill import assets
from diffdistill.card import LABELLED
from diffdistill.errors import guarded, writable, writable_file
from diffdistill.eval import metrics

LISTS = ("methods", "teachers", "data", "recipes", "metrics")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return guarded(lambda: args.call(args))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="diffdistill", description="Few-step students of diffusers pipelines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, call: Callable, text: str, example: str) -> Callable[..., Any]:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n  diffdistill {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(call=call)
        return sub.add_argument

    for name, text, recipe in (
        ("train", "train a student; the same command continues a run", "quickstart"),
        ("config", "every value of a configuration, and what set it", "quickstart train.steps=9"),
        ("teach", "train an embedded teacher from scratch", "shapes-sd"),
        ("doctor", "versions, devices, what is missing for which command", "quickstart"),
    ):
        add(name, globals()[name], text, f"recipe={recipe}")("settings", nargs="*", metavar="k=v")

    arg = add("list", list_, "what there is", "methods")
    arg("kind", choices=LISTS)
    arg("--json", action="store_true", help="for programs")

    arg = add("sample", sample, "a grid of samples", "runs/quickstart/student --teacher")
    arg("pipeline", help="student or teacher: an embedded name, or a folder (./NAME)")
    arg("--prompt", action="append", default=[], help="may be repeated")
    arg("--prompts", metavar="FILE", help="one prompt per line")
    arg("--labels", help="class labels: 0,1,2")
    arg("--num", type=int, help="images; prompts or labels are used in turn")
    arg("--steps", type=int, help="default: as trained")
    arg("--seed", type=int, default=0, help="of the first image; then seed + 1, ...")
    arg("--out", default="grid.png", metavar="PNG", help="default: grid.png")
    arg("--teacher", nargs="?", const="", help="the teacher's samples beside, same seeds")
    arg("--folder", metavar="DIR", help="single PNGs there, for evaluate, and no grid; resumable")
    arg("--geneval", action="store_true", help="with --folder: GenEval's prompts and layout")

    text = "the numbers of one pipeline, or of a folder of images"
    arg = add("evaluate", evaluate, text, "shapes-sd --num 1000")
    text = "student or teacher: an embedded name, or a folder (./NAME); or a folder of PNGs"
    arg("pipeline", help=text)
    arg("--metrics", help="default: those of the protocol; some of diffdistill list metrics")
    arg("--num", type=int, help="samples; default: as the protocol says")
    arg("--protocol", help="shapes-v1, edm-cifar10, custom-folder, ...; default: the pipeline's")
    text = "NAME.json and samples go there; resumable; default: NAME-HASH.json in evaluations/"
    arg("--out", metavar="DIR", help=text)
    arg("--reference", metavar="NPZ", help="of a folder: statistics of the real images")
    arg("--write-reference", metavar="NPZ", help="of a folder: store its statistics instead")
    arg("--network", metavar="NAME", help="of a folder, for custom-folder: the feature network")
    arg("--detector", metavar="BACKEND", help="of a folder of GenEval: what finds the objects")
    arg("--weights", action="append", default=[], metavar="NAME=PATH", help="may be repeated")
    arg("--allow-download", action="store_true", help="of weights that are not here")

    arg = add("report", report, "one HTML page about one or more runs", "runs/quickstart")
    arg("runs", nargs="+", metavar="RUN")
    arg("--out", metavar="DIR", help="default: RUN/report of the first run")

    text = "many methods at one budget of network passes, one table; the same command continues"
    arg = add("league", league, text, "shapes-sd --dry-run")
    arg("config", help="a name in configs/league, or a yaml file")
    arg("--only", action="append", default=[], metavar="NAME", help="this entry; may be repeated")
    arg("--rows", action="store_true", help="print the table as it stands, run nothing")
    arg("--dry-run", action="store_true", help="print steps and passes of each entry, run nothing")
    arg("--out", metavar="DIR", help="of rows and plots; default: assets/league of a checkout")
    arg("--runs", metavar="DIR", help="of the run folders; default: runs/league-CONFIG")
    return parser


def _forward(module: str) -> Callable[[argparse.Namespace], int]:
    return lambda args: importlib.import_module(f"diffdistill.{module}").main(args.settings)


train, teach, doctor = _forward("train"), _forward("teach"), _forward("doctor")


def list_(args: argparse.Namespace) -> None:
    from diffdistill.inventory import inventory

    rows = inventory(args.kind)
    if args.json:
        return print(json.dumps(rows, indent=2))
    for row in rows:
        print(f"{row.pop('name'):<14} {row.pop('about')}")
        for key, value in row.items():
            if value not in ("", [], None):
                print(f"{'':<14} {key}: {', '.join(value) if isinstance(value, list) else value}")


def config(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from diffdistill.config import compose, leaves

    cfg, provenance = compose(args.settings)
    rows = [(key, json.dumps(value), provenance[key]) for key, value in leaves(asdict(cfg))]
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for key, value, source in rows:
        print(f"{key:<{wide[0]}}  {value:<{wide[1]}}  # {source}")


def sample(args: argparse.Namespace) -> None:
    import torch

    from diffdistill.pipelines.loading import load_pipeline
    from diffdistill.tracking import picture_file, save_grid

    if args.folder:
        writable(args.folder, "--folder DIR")
    elif not args.geneval:
        picture_file(args.out, "--out PNG")
    generator = load_pipeline(args.pipeline, device=_device())
    if args.folder and args.teacher is not None:
        raise ValueError("--folder holds one pipeline's images. Give the teacher its own folder")
    if args.geneval:
        return _sample_geneval(args, generator)
    given = _conditions(args, generator.info)
    num = len(given) if args.num is None else args.num
    if num < 1:
        raise ValueError(f"--num is {num}. Allowed: 1 or more")
    conditions = [given[i % len(given)] for i in range(num)]
    if args.folder:
        from diffdistill.eval.folder import draw

        drawn = draw(args.folder, generator, conditions, first=args.seed, steps=args.steps)
        return print(f"{args.folder}: {drawn} images drawn, {num - drawn} were there")
    seeds = list(range(args.seed, args.seed + num))
    images, columns, note = generator.sample(conditions, seeds, steps=args.steps), min(num, 8), ""
    if args.teacher is not None:
        if not (name := args.teacher or generator.info.get("teacher")):
            raise ValueError(f"{args.pipeline} names no teacher. Give --teacher NAME_OR_FOLDER")
        teacher = load_pipeline(name, device=_device()).sample(conditions, seeds)
        images = torch.stack([teacher, images], 1).flatten(0, 1)
        columns, note = 2 * min(num, 4), "; pairs of teacher, student"
    save_grid(images, columns, Path(args.out))
    print(f"{args.out}: {num} images{note}")


def _sample_geneval(args: argparse.Namespace, generator: Any) -> None:
    from diffdistill.eval import evaluate, geneval_folder

    if not args.folder or args.prompt or args.prompts or args.labels or args.num or args.seed:
        raise ValueError("--geneval has its own prompts, seeds and number. Give --folder DIR alone")
    info = generator.info
    made = {
        "pipeline": f"{info['name']}-{evaluate.digest(generator.pipe, [])}",
        "steps": args.steps or info["steps"], "nfe": generator.nfe(args.steps),
        "guidance": info["guidance"], "seeds": "4 i + k",
    }  # fmt: skip
    sample = lambda prompts, seeds: generator.sample(prompts, seeds, steps=args.steps)  # noqa: E731
    print(f"{args.folder}: {geneval_folder.write(args.folder, sample, source=made)} images drawn")


def _conditions(args: argparse.Namespace, info: dict[str, Any]) -> list:
    """Prompts or labels: as given, else those of the pipeline's world."""
    from diffdistill.data import shapes

    prompts = [*args.prompt, *_read(args.prompts)]
    labels = [label.strip() for label in args.labels.split(",")] if args.labels else []
    if odd := [label for label in labels if not label.isdecimal()]:
        raise ValueError(f"--labels has {odd[0]!r}. Give class numbers, such as --labels 0,1,2")
    if prompts and labels:
        raise ValueError("both prompts and labels are given. Give what the pipeline takes")
    if prompts or labels:
        return prompts or [int(label) for label in labels]
    if info["family"] in LABELLED:
        return [i % 10 for i in range(20)]
    if info.get("world") == "shapes":
        return [shapes.scene(i, "test").caption for i in range(args.num or 18)]
    raise ValueError(f"what shall {args.pipeline} draw? Give --prompt TEXT or --prompts FILE")


def _read(prompts: str | None) -> list[str]:
    from diffdistill.data.prepare import read_prompts

    return [] if prompts is None else read_prompts(prompts, "--prompts FILE")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def evaluate(args: argparse.Namespace) -> None:
    names = metrics.named(args.metrics.split(",")) if args.metrics else None
    from diffdistill.launch import launched, set_threads

    accelerator = launched()
    if accelerator.num_processes > 1:
        set_threads(0, accelerator)
    if args.out or not args.write_reference:
        writable(args.out or "evaluations", "--out DIR")
    if args.write_reference:
        writable_file(args.write_reference, "--write-reference NPZ")
    place = assets.teacher(args.pipeline)
    marks = ("model_index.json", "config.yaml", "diffdistill.json")
    known = place and any((place / mark).is_file() for mark in marks)
    call = _evaluate_folder if place and not known else _evaluate_pipeline
    result, out = call(args, names, Path(args.out) if args.out else None, accelerator)
    if not accelerator.is_main_process:
        return
    if "records" in result:
        from diffdistill.eval.records import on_screen

        print(on_screen(result["records"]))
    for metric, why in result.get("left_out", {}).items():
        print(f"  {metric} is left out: {why}")
    print(out or _kept(result))


def _kept(result: dict[str, Any]) -> Path:
    """The file of a result for which no place was given; no other numbers are overwritten."""
    from diffdistill.eval.evaluate import write

    name = result.get("pipeline") or Path(result["folder"]).resolve().name
    numbers = json.dumps(result["records"], sort_keys=True).encode()
    file = Path("evaluations") / f"{name}-{hashlib.sha256(numbers).hexdigest()[:8]}.json"
    write(file, result)
    return file


def _evaluate_pipeline(
    args: argparse.Namespace, names: list[str] | None, folder: Path | None, accelerator: Any
) -> tuple[dict[str, Any], Path | None]:
    flags = ("reference", "write_reference", "network", "detector", "weights", "allow_download")
    if odd := [flag for flag in flags if getattr(args, flag)]:
        flag = odd[0].replace("_", "-")
        raise ValueError(f"--{flag} is for a folder of images, not {args.pipeline}. Leave it out")
    from diffdistill.eval.evaluate import evaluate as measure
    from diffdistill.pipelines.loading import load_pipeline

    generator = load_pipeline(args.pipeline, device=str(accelerator.device))
    out = folder / f"{generator.info['name']}.json" if folder else None
    result = measure(
        generator, metrics=names, n=args.num, protocol=args.protocol, out=out, samples=folder,
        accelerator=accelerator,
    )  # fmt: skip
    return result, out


def _evaluate_folder(
    args: argparse.Namespace, names: list[str] | None, place: Path | None, accelerator: Any
) -> tuple[dict[str, Any], Path | None]:
    from diffdistill.eval import folder

    out = place / f"{Path(args.pipeline).resolve().name}.json" if place else None
    if odd := [given for given in args.weights if "=" not in given]:
        raise ValueError(f"--weights {odd[0]}. Give NAME=PATH")
    paths = dict(given.split("=", 1) for given in args.weights)
    source = folder.Weights(paths, args.allow_download, accelerator.device)

    def refuse(*flags: str) -> None:
        if odd := [flag for flag in flags if getattr(args, flag) is not None]:
            flag = odd[0].replace("_", "-")
            raise ValueError(f"--{flag} has no meaning here. Leave it out")

    if args.detector or args.protocol == "geneval":
        refuse("reference", "write_reference", "network", "metrics", "num")
        if args.protocol not in (None, "geneval") or accelerator.num_processes > 1:
            raise ValueError("--detector is for protocol geneval and one process. Start it so")
        detector = args.detector or "m2f-swin-s"
        return folder.evaluate_geneval(args.pipeline, detector, source=source, out=out), out
    shared = {"network": args.network, "source": source, "accelerator": accelerator}
    if args.write_reference:
        refuse("reference", "metrics", "num", "out")
        file = folder.write_reference(args.pipeline, args.write_reference, args.protocol, **shared)
        return {}, file
    result = folder.evaluate_folder(
        args.pipeline, args.protocol, reference=args.reference, metrics=names, n=args.num, out=out,
        **shared,
    )  # fmt: skip
    return result, out


def report(args: argparse.Namespace) -> None:
    from diffdistill.eval.report import write_report

    if args.out:
        writable(args.out, "--out DIR")
    print(write_report(args.runs, args.out))


def league(args: argparse.Namespace) -> int:
    from diffdistill.league import league as run

    out, runs = (Path(given) if given else None for given in (args.out, args.runs))
    return run(
        args.config, only=args.only, rows=args.rows, dry_run=args.dry_run, out=out, runs=runs
    )
