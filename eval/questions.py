"""Benchmarks whose judges answer questions or score videos: their numbers from given answers.

GenEval 2 (arXiv 2512.16853): the soft score of an atom is the probability of its accepted answers.
Soft-TIFA AM and GM: arithmetic and geometric mean over the atoms of a prompt, then 100 times the
mean over prompts.

DPG-Bench (arXiv 2403.05135): a question counts if it is answered "yes" and none of its parents
scored 0. Mean over the questions of an image, the images of a prompt, the prompts; times 100.

VBench (arXiv 2311.17982): (score - min) / (max - min) of 16 dimensions, weighted means of the 7 of
quality and the 9 of semantics; total = (4 quality + semantic) / 5.

Neither data nor judges ship. Data are the files of the benchmarks, from a path that the user gives
(GenEval 2 is CC BY-NC 4.0); the name of the judge is part of the result.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GENEVAL2_SUFFIX = " Answer in one word."  # after every question; the judge writes one greedy token
GENEVAL2_PROMPTS, DPG_PROMPTS, DPG_IMAGES = 800, 1065, 4
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def read_geneval2(path: str | Path) -> list[dict[str, Any]]:
    """Every prompt: prompt, atom_count, vqa_list of [question, answer], skills of the questions."""
    text = _read(path, "GenEval 2's geneval2_data.jsonl, 0.4 MB, github facebookresearch/GenEval2")
    try:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
        fit = all(len(r["vqa_list"]) == len(r["skills"]) > 0 for r in records)
        fit = fit and all({"prompt", "atom_count"} <= {*r} for r in records)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not GenEval 2's data: {error!r}. Get it again.") from error
    if not records or not fit:
        raise ValueError(f"{path} is not GenEval 2's data: fields do not match. Get it again.")
    return records


def accepted_answers(question: str, answer: str) -> tuple[str, ...]:
    """Texts whose first tokens' probabilities add up to the soft score of a GenEval 2 question."""
    words = ("Yes", "yes")
    if question.startswith("How many"):
        if answer not in _NUMBERS:
            raise ValueError(f"answer {answer!r} to {question!r}. Allowed: {', '.join(_NUMBERS)}")
        words = (answer, answer.capitalize(), str(_NUMBERS.index(answer) + 1))
    return tuple(space + word for word in words for space in ("", " "))


def soft_tifa(
    records: Sequence[Mapping[str, Any]], scores: Sequence[Sequence[float]], *, judge: str
) -> dict[str, Any]:
    """GenEval 2 from the soft scores of every question of every prompt, 0..1.

    Returns:
        am, gm: 0..100. skills: mean of all atoms of a skill. atom_counts: GM by atom count.
    """
    if len(scores) != len(records):
        raise ValueError(f"{len(scores)} lists of scores for {len(records)} prompts. Give as many")
    for record, row in zip(records, scores, strict=True):
        if len(row) != len(record["skills"]):
            raise ValueError(
                f"{len(row)} scores for {len(record['skills'])} questions of the prompt "
                f"{record['prompt']!r}. Give one per question"
            )
        if not all(0 <= s < 1.001 for s in row):  # sums of probabilities, so rounding is allowed
            raise ValueError(f"scores {list(row)} of {record['prompt']!r} are not all in 0..1")
    skills, sizes = defaultdict(list), defaultdict(list)
    for record, row in zip(records, scores, strict=True):
        sizes[record["atom_count"]].append(_geometric(row))
        for skill, score in zip(record["skills"], row, strict=True):
            skills[skill].append(score)
    return {
        "protocol": _protocol("geneval2", len(records), GENEVAL2_PROMPTS),
        "judge": judge,
        "n": len(records),
        "am": 100 * _mean(_mean(row) for row in scores),
        "gm": 100 * _mean(_geometric(row) for row in scores),
        "skills": {k: 100 * _mean(v) for k, v in sorted(skills.items())},
        "atom_counts": {k: 100 * _mean(v) for k, v in sorted(sizes.items())},
    }


@dataclass(frozen=True)
class Question:
    """One question of DPG-Bench. `category` is "entity - whole" and the like."""

    id: int
    text: str
    category: str
    parents: tuple[int, ...]


def read_dpg(path: str | Path) -> dict[str, list[Question]]:
    """Questions of every prompt, by its name, in the order of dpg_bench.csv."""
    text = _read(path, "DPG-Bench's dpg_bench.csv, github TencentQQGYLab/ELLA")
    rows = list(csv.DictReader(io.StringIO(text)))
    if rows and not rows[0].get("proposition_id", "").strip().isdigit():
        rows = rows[1:]  # a second head line
    questions: dict[str, list[Question]] = defaultdict(list)
    try:
        for row in rows:
            parents = tuple(int(p) for p in row["dependency"].split(",") if int(p))
            category = row["tuple"].split("(")[0].strip()
            asked = row["question_natural_language"]
            question = Question(int(row["proposition_id"]), asked, category, parents)
            questions[row["item_id"]].append(question)
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not dpg_bench.csv: {error!r}. Get the file again.") from error
    if not questions:
        raise ValueError(f"{path} has no questions. Get dpg_bench.csv again.")
    return dict(questions)


def dpg(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Mapping[int | str, str]]],
    *,
    judge: str,
) -> dict[str, Any]:
    """DPG-Bench from answers[prompt][image][question id].

    A prompt that cannot be scored is left out of the mean, as in the published code, but it is
    counted here, with the reason. Categories use the answers before parents count, of all images
    (the published code: of the last one).

    Returns:
        protocol: dpg for 4 images of each of the 1,065 prompts. n, images: of those scored.
        score: 0..100. categories: by the word before " - ". details: by the full category.
    """
    strange = sorted({*answers} - {*questions})
    if strange:
        raise ValueError(f"answers for {strange[0]!r}, no prompt of the data. Check the file names")
    scores: list[float] = []
    counts: list[int] = []
    broad, detailed = defaultdict(list), defaultdict(list)
    failed: dict[str, str] = {}
    for name, asked in questions.items():
        images = [{int(k): v for k, v in image.items()} for image in answers.get(name, ())]
        failed |= {name: why} if (why := _unscorable(asked, images)) else {}
        if name in failed:
            continue
        scores.append(_mean(_with_parents(asked, image) for image in images))
        counts.append(len(images))
        for image in images:
            for q in asked:
                right = float(image[q.id] == "yes")
                broad[q.category.split("-")[0].strip()].append(right)
                detailed[q.category].append(right)
    if not scores:
        raise ValueError(f"no prompt has answers to all its questions. First: {failed}"[:300])
    return {
        "protocol": _dpg_protocol(counts),
        "judge": judge,
        "n": len(scores),
        "images": sum(counts),
        "failed": failed,
        "score": 100 * _mean(scores),
        "categories": {k: 100 * _mean(v) for k, v in sorted(broad.items())},
        "details": {k: 100 * _mean(v) for k, v in sorted(detailed.items())},
    }


def _unscorable(asked: Sequence[Question], images: Sequence[Mapping[int, str]]) -> str:
    ids = {q.id for q in asked}
    if not images:
        return "no answers"
    if lacking := sorted(ids - set.intersection(*({*image} for image in images))):
        return f"no answer to question {lacking[0]}"
    if orphans := [q.id for q in asked if {*q.parents} - ids]:
        return f"question {orphans[0]} has a parent that is not asked"
    return ""


def _with_parents(asked: Sequence[Question], image: Mapping[int, str]) -> float:
    """Mean over the questions; in their order, so that a zero is handed down."""
    scores = {q.id: float(image[q.id] == "yes") for q in asked}
    for q in asked:
        if any(scores[p] == 0 for p in q.parents):
            scores[q.id] = 0.0
    return _mean(scores.values())


VBENCH = {  # dimension: least and largest score, weight; the published table
    "subject consistency": (0.1462, 1.0, 1.0),
    "background consistency": (0.2615, 1.0, 1.0),
    "temporal flickering": (0.6293, 1.0, 1.0),
    "motion smoothness": (0.706, 0.9975, 1.0),
    "aesthetic quality": (0.0, 1.0, 1.0),
    "imaging quality": (0.0, 1.0, 1.0),
    "dynamic degree": (0.0, 1.0, 0.5),
    "object class": (0.0, 1.0, 1.0),
    "multiple objects": (0.0, 1.0, 1.0),
    "human action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance style": (0.0009, 0.2855, 1.0),
    "temporal style": (0.0, 0.364, 1.0),
    "overall consistency": (0.0, 0.364, 1.0),
}
_QUALITY, _SEMANTIC = [*VBENCH][:7], [*VBENCH][7:]


def read_vbench(paths: Iterable[str | Path]) -> dict[str, float]:
    """Scores of the dimensions from VBench's *_eval_results.json files."""
    scores: dict[str, float] = {}
    for path in paths:
        text = _read(path, "VBench's result, written by its evaluation")
        try:
            scores |= {k: float(v[0]) for k, v in json.loads(text).items()}
        except (ValueError, AttributeError, TypeError, LookupError) as error:
            raise ValueError(f"{path} is no result of VBench: {error!r}. Run it again.") from error
    return scores


def vbench(scores: Mapping[str, float]) -> dict[str, Any]:
    """Total, quality, semantic and the normalised dimensions, 1 the best published range.

    Args:
        scores: of all 16 dimensions, named with spaces or underscores. The published script counts
            a missing one as 0; here it is an error.
    """
    given = {k.replace("_", " "): v for k, v in scores.items()}
    if {*given} != {*VBENCH}:
        strange, lacking = sorted({*given} - {*VBENCH}), [d for d in VBENCH if d not in given]
        raise ValueError(
            f"VBench's total needs its {len(VBENCH)} dimensions. Missing: "
            f"{', '.join(lacking) or 'none'}; unknown: {', '.join(strange) or 'none'}. Run those"
        )
    normal = {d: (given[d] - low) / (high - low) for d, (low, high, _) in VBENCH.items()}
    quality, semantic = _weighted(normal, _QUALITY), _weighted(normal, _SEMANTIC)
    return {
        "protocol": "vbench",
        "total": (4 * quality + semantic) / 5,
        "quality": quality,
        "semantic": semantic,
        "dimensions": normal,
    }


def _weighted(values: Mapping[str, float], names: Sequence[str]) -> float:
    weights = {name: VBENCH[name][2] for name in names}
    return sum(values[name] * w for name, w in weights.items()) / sum(weights.values())


def _read(path: str | Path, what: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing: {what}. It does not ship; get it and give its path.")
    return Path(path).read_text(encoding="utf-8")


def _protocol(name: str, n: int, whole: int) -> str:
    return name if n == whole else f"{name}/n={n}"


def _dpg_protocol(counts: Sequence[int]) -> str:
    """From the images of each prompt."""
    per_prompt = sorted({*counts})
    if per_prompt == [DPG_IMAGES]:
        return _protocol("dpg", len(counts), DPG_PROMPTS)
    return f"dpg/n={len(counts)}x{'-'.join(map(str, per_prompt))}"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(_mean(math.log(v) for v in values)) if min(values) > 0 else 0.0
