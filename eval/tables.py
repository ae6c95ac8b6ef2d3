"""The README's tables, made from assets/reference (teachers) and assets/results (students).

    python -m diffdistill.eval.tables          # rewrites the block between the README's markers
"""

from __future__ import annotations

import json
from pathlib import Path

from diffdistill import assets
from diffdistill.eval.protocols import PROTOCOLS, teacher_rows

START, END = "<!-- results -->", "<!-- /results -->"
NAMES = {"fd": "FD", "recall": "recall", "coverage": "coverage", "clip": "CLIP score"}
NAMES |= {"geneval": "GenEval", "accuracy": "class accuracy"}


def markdown() -> str:
    """One table per protocol: teacher rows, then students, best evidence of each."""
    return "\n\n".join(_table(name) for name in PROTOCOLS if teacher_rows(name))


def _table(protocol: str) -> str:
    rows = [(f"teacher `{r['pipeline']}`", r) for r in teacher_rows(protocol)]
    for file in sorted(assets.path("results").glob("*.json")):
        result = json.loads(file.read_text())
        if result["protocol"] == protocol:
            rows.append((f"`recipe={file.stem}`", result))
    shown = [m for m in NAMES if m in PROTOCOLS[protocol].metrics]
    first = rows[0][1]["records"][0]
    lines = [
        f"Protocol `{protocol}`, n = {first['n']}, features `{first['feature_net']}`, floor FD "
        f"{rows[0][1]['floor_fd']:.2f}:",
        "",
        "| pipeline | steps | passes | " + " | ".join(NAMES[m] for m in shown) + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for name, row in rows:
        values = {r["metric"]: r for r in row["records"]}
        cells = [_number(values[m]["value"]) for m in shown]
        nfe = next(iter(values.values()))["nfe"]
        lines.append(f"| {name} | {row['steps']} | {nfe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def updated(readme: str) -> str:
    """The README's text with fresh tables."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{markdown()}\n{END}{after}"


def main(path: Path | None = None) -> None:
    path = path or assets.root().parent / "README.md"
    path.write_text(updated(path.read_text()))


if __name__ == "__main__":
    main()
