"""The README's tables, made from stored results.

    python -m diffdistill.eval.tables          # rewrites the blocks between the README's markers

`results`: assets/reference (teachers) and assets/results (students of the recipes).
`league`: assets/league (methods against each other at one budget).
"""

from __future__ import annotations

import json
from pathlib import Path

from diffdistill import assets
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


def _table(protocol: str) -> str:
    rows = [(f"teacher `{r['pipeline']}`", r) for r in teacher_rows(protocol)]
    for file in sorted(assets.path("results").glob("*.json")):
        result = json.loads(file.read_text())
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
        start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
        before, opened, rest = readme.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"the README has no block {start} ... {end}. Put the two lines back")
        readme = f"{before}{start}\n{make()}\n{end}{after}"
    return readme


def main(path: Path | None = None) -> None:
    path = path or assets.root().parent / "README.md"
    path.write_text(updated(path.read_text()))


if __name__ == "__main__":
    main()
