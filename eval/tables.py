"""The tables of the README and of the teachers' cards, made from stored results.

    python -m diffdistill.eval.tables          # rewrites the blocks between their markers

`results`: assets/reference (teachers) and assets/results (students of the recipes).
`league`: assets/league (methods against each other at one budget).
`scores`: of a card: assets/reference (the teacher at its full number of steps).
"""

from __future__ import annotations

import json

from diffdistill import assets
from diffdistill.card import metrics_table
from diffdistill.eval import standings
from diffdistill.eval.protocols import PROTOCOLS, teacher_rows
from diffdistill.eval.records import key

SHOWN = ("fd", "recall", "coverage", "diversity", "vendi_prompt", "clip", "geneval", "accuracy")


def results() -> str:
    """One table per protocol: teacher rows, then students, best evidence of each."""
    return "\n\n".join(_table(name) for name in PROTOCOLS if teacher_rows(name))


def league() -> str:
    """The tables of assets/league."""
    files = sorted(assets.path("league").glob("*.json"))
    tables = [standings.markdown(json.loads(file.read_text())) for file in files]
    return "\n\n".join(tables) or "No league has been run yet."


BLOCKS = {"results": results, "league": league}


def scores(teacher: str) -> str:
    """Every number of an embedded teacher at its full number of steps."""
    file = assets.path("reference", f"{teacher}.json")
    stored = json.loads(file.read_text()) if file.is_file() else {"weights": None}
    info = json.loads(assets.path("teachers", teacher, "diffdistill.json").read_text())
    if stored["weights"] != info["weights"]:
        raise ValueError(
            f"{file} has no rows of the weights that ship as {teacher}. Make them: "
            f"python -m diffdistill.eval.protocols --rows {teacher}"
        )
    full = max(stored["rows"], key=lambda row: row["steps"])
    return (
        f"{full['steps']} steps, {full['records'][0]['nfe']} network passes per image; the FD of "
        f"real test images is {full['floor_fd']:.2f}.\n\n{metrics_table(full['records'])}"
    )


def _table(protocol: str) -> str:
    rows = [(f"teacher `{r['pipeline']}`", r) for r in teacher_rows(protocol)]
    for file in sorted(assets.path("results").glob("*.json")):
        result = json.loads(file.read_text())
        if result["protocol"] not in PROTOCOLS:
            raise ValueError(
                f"{file} was judged under {result['protocol']!r}, which is no protocol of the "
                "tables. Judge it with all samples (without evaluate.n), or remove it"
            )
        if result["protocol"] == protocol:
            rows.append((f"`recipe={file.stem}`", result))
    numbers = [{r["metric"]: r for r in row["records"]} for _, row in rows]
    shown = [m for m in SHOWN if any(m in values for values in numbers)]
    first = rows[0][1]["records"][0]
    counts = {m: next(v[m]["n"] for v in numbers if m in v) for m in shown}
    few = {m: f" (n = {counts[m]})" for m in shown if counts[m] != first["n"]}
    keys: dict[str, tuple] = {}
    for name, row in rows:
        for r in row["records"]:
            if keys.setdefault(r["metric"], key(r)) != key(r):
                raise ValueError(
                    f"{r['metric']} of {name} under {protocol} cannot be compared with that of the "
                    "rows above. Make them again"
                )
    lines = [
        f"Protocol `{protocol}`, n = {first['n']}, features `{first['feature_net']}`, floor FD "
        f"{rows[0][1]['floor_fd']:.2f}:",
        "",
        "| pipeline | steps | passes | "
        + " | ".join(standings.NAMES[m] + few.get(m, "") for m in shown)
        + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for (name, row), values in zip(rows, numbers, strict=True):
        cells = [standings.number(values[m]["value"]) if m in values else "" for m in shown]
        nfe = next(iter(values.values()))["nfe"]
        lines.append(f"| {name} | {row['steps']} | {nfe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README's text with fresh tables."""
    for block, make in BLOCKS.items():
        readme = _filled(readme, "the README", block, make())
    return readme


def updated_card(teacher: str, card: str) -> str:
    """The text of an embedded teacher's card with fresh scores."""
    return _filled(card, f"the card of {teacher}", "scores", scores(teacher))


def _filled(text: str, what: str, block: str, content: str) -> str:
    start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{what} has no block {start} ... {end}. Put the two lines back")
    return f"{before}{start}\n{content}\n{end}{after}"


def main() -> None:
    """Of a checkout: the README and the cards in assets/teachers."""
    readme = assets.root().parent / "README.md"
    made = {readme: updated(readme.read_text())}
    for teacher in assets.names("teachers"):
        card = assets.path("teachers", teacher, "README.md")
        made[card] = updated_card(teacher, card.read_text())
    for file, text in made.items():
        aside = file.with_name(f".{file.name}.partial")
        aside.write_text(text)
        aside.replace(file)


if __name__ == "__main__":
    main()
