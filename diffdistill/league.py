"""`diffdistill league CONFIG`: entries x teachers x seeds at one budget of network passes.

An entry is an ordinary run of `diffdistill train`, in its own process and run folder: it resumes,
and `diffdistill report` reads it. How many steps it gets follows from the budget and from what its
steps and teacher pairs cost (`diffdistill.passes`). A finished run becomes a row in
OUT/<teacher>.json, or one for each number of steps that its student was sampled with; the run
folders say what is finished, so the same command continues.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from diffdistill import assets
from diffdistill.config import RunConfig, compose, fingerprint, folder, names
from diffdistill.errors import writable
from diffdistill.eval import standings, tables
from diffdistill.eval.protocols import teacher_rows
from diffdistill.eval.records import evaluations
from diffdistill.registry import unknown

# settings that follow from other fields of an entry
GIVEN = {
    "recipe": "recipe", "method": "method", "teacher": "teachers", "train.seed": "seeds",
    "train.steps": "budget", "method.student_steps": "steps", "run.root": "name",
    "run.name": "name", "evaluate.at_end": "name", "evaluate.steps": "steps",
}  # fmt: skip


@dataclass
class Entry:
    name: str = MISSING
    method: str | None = None  # and, or,
    recipe: str | None = None
    steps: Any = 1  # of the student; a list: one training, a row for each (`Method.any_steps`)
    set: dict[str, Any] = field(default_factory=dict)  # as on the command line of train
    seeds: list[int] | None = None  # None: the league's
    teachers: list[str] | None = None  # None: the league's

    @property
    def counts(self) -> list[int]:
        """Numbers of student steps; it is trained with the first."""
        return self.steps if isinstance(self.steps, list) else [self.steps]


@dataclass
class League:
    budget: int = MISSING  # network passes of training, teacher pairs included
    teachers: list[str] = MISSING
    entries: list[Entry] = MISSING
    seeds: list[int] = field(default_factory=lambda: [0])
    set: dict[str, Any] = field(default_factory=dict)  # of every entry; an entry's own win


@dataclass(frozen=True)
class Job:
    """One run of a league."""

    league: str
    config: str  # as given on the command line
    teacher: str
    weights: str  # hash of the teacher's network
    entry: Entry
    seed: int
    budget: int
    argv: tuple[str, ...]  # of diffdistill train
    cfg: RunConfig
    folder: Path
    asked: str  # hash, see `asked_of`
    pairs: int  # passes
    spent: tuple[int, ...]  # passes after each step, pairs included

    @property
    def label(self) -> str:
        return f"{self.teacher} {self.entry.name} seed {self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()


def league(
    config: str,
    *,
    only: Sequence[str] = (),
    rows: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
    runs: Path | None = None,
) -> int:
    """Run what is not finished. Returns 0, or the exit code of entries that failed.

    In a checkout the README's tables are made again at the end (`diffdistill.eval.tables`).

    Args:
        config: name in configs/league, or the path of a yaml file.
        only: names of entries; default: all.
        rows: print the table as it stands, and run nothing.
        dry_run: print steps and passes of every entry, and run nothing.
        out: where the rows are; default: assets/league of a checkout, else ./league.
        runs: where the run folders are; default: ./runs/league-NAME.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a league draws its results: pip install matplotlib")
    name, rules = read(config, only)
    out = out or (assets.path("league") if assets.path("results").is_dir() else Path("league"))
    if rows:
        return _print_rows(name, rules, out)
    runs = runs or Path("runs") / f"league-{name}"
    jobs = plan(name, config, rules, runs)
    if dry_run:
        return _print_plan(jobs, rules)
    writable(out, "--out DIR")
    writable(runs, "--runs DIR")
    failed: dict[str, int] = {}
    for job in jobs:
        with locked(job.folder) as lock:
            code = 0 if job.done else train(job.argv, lock)
            if job.done:
                print(f"{job.label}: {publish(job, out)}", flush=True)
            elif code in (0, -signal.SIGTERM):
                print(f"stopped in {job.label}; the same command continues")
                return 0
            elif code == 130:
                raise KeyboardInterrupt
            else:
                failed[f"{job.label} ({job.folder})"] = code
    _print_rows(name, rules, out)
    for which in failed:
        print(f"failed: {which}; the same command tries again", file=sys.stderr)
    if assets.path("results").is_dir() and out.resolve() == assets.path("league").resolve():
        with locked(out):
            tables.main()
        print("the tables of README.md are made again from these rows")
    return 0 if not failed else 2 if set(failed.values()) == {2} else 1


# ---- the configuration ------------------------------------------------------------------


def read(config: str, only: Sequence[str] = ()) -> tuple[str, League]:
    """(name, checked configuration) of a league, with the entries `only`."""
    known = names("league")
    path = folder("league") / f"{config}.yaml" if config in known else Path(config).expanduser()
    if not path.is_file():
        raise ValueError(unknown("league", config, known) + ", or the path of a yaml file")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ValueError(f"{path} holds a list. Give `budget`, `teachers` and `entries`")
        rules: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(League), loaded))
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    _check(path, rules)
    listed = [entry.name for entry in rules.entries]
    for wanted in only:
        if wanted not in listed:
            raise ValueError(unknown("entry", wanted, listed))
    rules.entries = [e for e in rules.entries if not only or e.name in only]
    return path.stem, rules


def _check(path: Path, rules: League) -> None:
    if rules.budget < 1:
        raise ValueError(f"{path}: budget is {rules.budget}. Allowed: 1 or more network passes")
    if not (rules.entries and rules.teachers and rules.seeds):
        raise ValueError(f"{path}: give at least one entry, one teacher and one seed")
    short = [Path(teacher).name for teacher in rules.teachers]
    if twins := sorted({name for name in short if short.count(name) > 1}):
        raise ValueError(
            f"{path}: two teachers are named {twins[0]!r}, and rows go into OUT/{twins[0]}.json. "
            "Rename the folder of one"
        )
    seen = set()
    for entry in rules.entries:
        if not re.fullmatch(r"[\w+-]+", entry.name) or entry.name in seen:
            raise ValueError(
                f"{path}: entry name {entry.name!r}. Allowed: letters, digits and _+-, once each"
            )
        seen.add(entry.name)
        counts = entry.counts
        right = all(type(k) is int and k > 0 for k in counts)
        if not (right and counts and len({*counts}) == len(counts)):
            raise ValueError(
                f"{path}: entry {entry.name!r} has steps {entry.steps!r}. Allowed: a whole number "
                "above 0, or a list of different ones"
            )
        if stray := set(entry.teachers or ()) - set(rules.teachers):
            raise ValueError(
                f"{path}: entry {entry.name!r} names teacher {min(stray)!r}. The league has: "
                f"{', '.join(rules.teachers)}"
            )
        if entry.method is None and entry.recipe is None:
            raise ValueError(f"{path}: entry {entry.name!r} needs a method or a recipe")
        for key in (*rules.set, *entry.set):
            if key in GIVEN:
                raise ValueError(f"{path}: {key} cannot be set; it follows from `{GIVEN[key]}`")


# ---- the plan ---------------------------------------------------------------------------


def plan(name: str, config: str, rules: League, runs: Path) -> list[Job]:
    """Every run of the league, with the number of steps that the budget buys."""
    from diffdistill.finish import further_samplers, sampling_info
    from diffdistill.launch import launched
    from diffdistill.passes import Counter, dry_engine, of_pairs
    from diffdistill.teachers import load_teacher

    composed = [
        (source, entry, *settings(rules, entry, source))
        for source in rules.teachers
        for entry in rules.entries
        if source in (entry.teachers or rules.teachers)
    ]  # all of them, before anything is loaded
    accelerator, jobs, teacher, weights = launched(), [], None, ""
    loaded = ""
    for source, entry, argv, cfg in tqdm(composed, desc="count passes", disable=None):
        if source != loaded:
            teacher, loaded = load_teacher(source), source
            weights = _weights_hash(teacher.denoiser)
        if not teacher.info.get("protocol"):
            raise ValueError(f"teacher {source!r} names no protocol, so nothing can be ranked")
        with _named(entry):
            engine = dry_engine(cfg, teacher, accelerator)
            _check_steps(entry, sampling_info(engine.method.sampler())[0])
            further_samplers(cfg, teacher)  # refuses times that do not fall
            pairs, counter = of_pairs(cfg, teacher), Counter(engine)
            asked = asked_of(cfg, rules.budget)
            for seed in entry.seeds or rules.seeds:
                spent = _spent(rules.budget, pairs, counter.steps(seed))
                cfg = replace(cfg, train=replace(cfg.train, seed=seed, steps=len(spent)))
                key = json.dumps([fingerprint(cfg), weights, cfg.evaluate.n, *cfg.evaluate.steps])
                digest = hashlib.sha256(key.encode()).hexdigest()[:6]
                short = Path(source).name
                where = re.sub(r"[^\w+-]+", "-", f"{short}-{entry.name}-s{seed}-{digest}")
                whole = (
                    *argv, f"train.seed={seed}", f"train.steps={len(spent)}", f"run.root={runs}",
                    f"run.name={where}", "evaluate.at_end=true",
                )  # fmt: skip
                jobs.append(
                    Job(
                        name, config, short, weights, entry, seed, rules.budget, whole, cfg,
                        runs / where, asked, pairs, spent,
                    )
                )  # fmt: skip
    order = lambda job: (job.entry.seeds or rules.seeds).index(job.seed)  # noqa: E731
    return sorted(jobs, key=order)  # a whole table of first seeds, then the next ones


def settings(rules: League, entry: Entry, teacher: str) -> tuple[list[str], RunConfig]:
    """The arguments of `diffdistill train`, but for seed, steps and folder; what they compose."""
    picked = {"recipe": entry.recipe, "method": entry.method, "teacher": teacher}
    argv = [f"{key}={value}" for key, value in picked.items() if value is not None]
    more = rules.set | entry.set
    with _named(entry):
        cfg, _ = compose(argv)
        if "student_steps" in (f.name for f in fields(cfg.method)):
            more["method.student_steps"] = entry.counts[0]
        if further := entry.counts[1:]:
            more["evaluate.steps"] = further
        for key, value in more.items():
            argv.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        return argv, compose(argv)[0]


def asked_of(cfg: RunConfig, budget: int) -> str:
    """Hash of what is asked of an entry: as `settings` composes it, whatever its seed and steps."""
    cfg = replace(cfg, train=replace(cfg.train, steps=1))  # the budget says how many
    key = json.dumps([fingerprint(cfg), cfg.evaluate.n, budget, *cfg.evaluate.steps])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


@contextlib.contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Errors inside say which entry is meant."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"entry {entry.name!r}: {error}") from error


def _check_steps(entry: Entry, steps: int) -> None:
    first = entry.counts[0]
    if steps != first:
        raise ValueError(f"its student has {steps} step(s), not {first}. Set steps: {steps}")


def _spent(budget: int, pairs: int, steps: Iterator[int]) -> tuple[int, ...]:
    """Passes after each step that the budget buys, those for pairs included."""
    totals = itertools.accumulate(steps, initial=pairs)
    spent = tuple(itertools.takewhile(lambda total: total <= budget, totals))[1:]
    if not spent:
        raise ValueError(
            f"{budget:,} passes do not buy one step after {pairs:,} for teacher pairs. Raise the "
            "budget, or lower the number of pairs"
        )
    return spent


def _weights_hash(denoiser: Any) -> str:
    digest = hashlib.sha256()
    for p in denoiser.parameters():
        digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


# ---- running ----------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Alone in a folder; a training whose league was killed still holds it until it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works in {folder}; waiting for its end", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def train(argv: Sequence[str], lock: int) -> int:
    """Exit code of `diffdistill train` in its own process, whose peak memory is its own."""
    command = [sys.executable, "-m", "diffdistill.train", *argv]
    child = subprocess.Popen(command, pass_fds=(lock,))
    previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


def publish(job: Job, out: Path) -> str:
    """Put the rows of a finished run into their file; draw the plot. Returns a line about them."""
    made = rows_of(job)
    file = out / f"{job.teacher}.json"
    with locked(out):
        before = json.loads(file.read_text()) if file.is_file() else []
        rows = before
        for row in made:
            rows = merged(rows, row)
        if rows != before or not file.with_suffix(".png").is_file():
            aside = file.with_suffix(".partial")
            aside.write_text(json.dumps(rows, indent=1) + "\n")
            aside.replace(file)
            standings.plot(rows, file.with_suffix(".png"))
    parts = []
    for row in made:
        named = (f"{standings.NAMES.get(k, k)} {v:.4g}" for k, v in row["metrics"].items())
        how = f"{row['steps']} step(s): " if len(made) > 1 else ""
        parts.append(f"{how}{', '.join(named)}")
    first = made[0]
    return f"{'; '.join(parts)} (n = {first['n']}, {first['protocol']}); {first['passes']:,} passes"


def rows_of(job: Job) -> list[dict[str, Any]]:
    """The rows of a finished run: one for each number of student steps."""
    info = json.loads((job.folder / "student" / "diffdistill.json").read_text())
    lock = json.loads((job.folder / "config.lock.json").read_text())
    made, cost = evaluations(job.folder), info["train"]
    passes = job.pairs + cost["network_passes"]
    if passes != job.spent[-1]:
        raise RuntimeError(
            f"{job.label} took {passes:,} passes, and {job.spent[-1]:,} were counted before. Its "
            "numbers are not of this budget; please report this"
        )
    same = {
        "league": job.league,
        "method": job.cfg.method_name,
        "entry": job.entry.name,
        "teacher": job.teacher,
        "teacher_weights": job.weights,
        "teacher_files": info.get("teacher_weights"),
        "seed": job.seed,
        "asked": job.asked,
        "budget": job.budget,
        "passes": passes,
        "pair_passes": job.pairs,
        "images": cost["images"],
        "train_steps": cost["steps"],
        "batch_size": cost["batch_size"],
        "seconds": cost["seconds"],
        "peak_memory_gib": cost["peak_memory_gib"],
        "processes": cost["processes"],
        "trained_on": cost["device"],
        "command": f"diffdistill league {job.config} --only {job.entry.name}",
        "train_command": shlex.join(
            word for word in shlex.split(info["command"]) if not word.startswith("run.")
        ),
        "versions": lock["versions"],
    }
    return [
        same | _evaluation(made[k][len(job.spent)]) | {"curve": _curve(job, made[k])}
        for k in (0, *job.entry.counts[1:])
    ]


def _curve(job: Job, made: dict[int, dict[str, Any]]) -> list[list[float]]:
    """[passes, FD] of the evaluations of a run."""
    fd = {
        step: next(r["value"] for r in m["records"] if r["metric"] == "fd")
        for step, m in sorted(made.items())
        if step > 0
    }
    return [[job.spent[step - 1], value] for step, value in fd.items()]


def _evaluation(result: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of an evaluation."""
    more = ("floor_fd", "kd_std", "tasks")
    return standings.packed(result["records"]) | {k: result[k] for k in more if k in result}


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this one in its place and with the teacher's as they ship now.

    Rows of its entry for which something else was asked, or of other teacher weights, are dropped.
    """
    key = lambda r: (r["league"], r["entry"], r["seed"], r["steps"])  # noqa: E731
    made = lambda r: (r["asked"], r["teacher_weights"])  # noqa: E731
    others = [
        r
        for r in rows
        if r["method"] != standings.TEACHER and (key(r)[:2] != key(row)[:2] or made(r) == made(row))
    ]
    places = [i for i, r in enumerate(others) if key(r) == key(row)]
    if places:
        others[places[0]] = row
    else:
        others.append(row)
    protocol = row["protocol"].partition("/")[0]
    return [
        {
            "league": "", "method": standings.TEACHER, "entry": standings.TEACHER,
            "teacher": row["teacher"], "teacher_files": result["weights"], "seed": None,
            "asked": "", **_evaluation(result), "budget": None, "passes": 0, "images": 0,
            "curve": [],
            "command": f"python -m diffdistill.eval.protocols --rows {row['teacher']}",
        }
        for result in teacher_rows(protocol)
        if result["pipeline"] == row["teacher"]
    ] + others  # fmt: skip


# ---- what is printed --------------------------------------------------------------------


def _print_rows(name: str, rules: League, out: Path) -> int:
    """The tables of this league's teachers as they stand, and what is still to come."""
    for source in rules.teachers:
        teacher = Path(source).name
        file = out / f"{teacher}.json"
        rows = json.loads(file.read_text()) if file.is_file() else []
        named = ("entry", "seed", "asked", "steps")
        card = (assets.teacher(source) or Path(source)) / "diffdistill.json"
        of = json.loads(card.read_text()).get("weights") if card.is_file() else None
        # other files of that name have rows of their own
        mine = [r for r in rows if r["league"] == name and of in (None, r["teacher_files"])]
        there = {tuple(r[k] for k in named) for r in mine}
        asked = [
            (entry, seed, asked_of(settings(rules, entry, source)[1], rules.budget))
            for entry in rules.entries
            if source in (entry.teachers or rules.teachers)
            for seed in entry.seeds or rules.seeds
        ]
        if table := standings.markdown(rows):
            print(f"\n{table}\n")
        left = [
            f"{entry.name} seed {seed}"
            for entry, seed, digest in asked
            if not there >= {(entry.name, seed, digest, k) for k in entry.counts}
        ]
        print(f"{teacher}: {len(asked) - len(left)} of {len(asked)} entries have a row")
        if left:
            print(f"without one: {', '.join(left)}")
    return 0


def _print_plan(jobs: list[Job], rules: League) -> int:
    print(f"budget: {rules.budget:,} network passes each")
    for job in jobs:
        steps = ", ".join(map(str, job.entry.counts))
        pairs = f", {job.pairs:,} of them for teacher pairs" if job.pairs else ""
        print(
            f"{job.label}: {job.cfg.method_name}, {steps} student step(s), "
            f"{len(job.spent)} steps of {job.cfg.train.batch_size}, {job.spent[-1]:,} passes"
            f"{pairs}; {'finished' if job.done else 'to do'}: {job.folder}"
        )
    return 0
