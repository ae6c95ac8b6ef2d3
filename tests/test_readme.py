"""The README's own example method runs as it stands."""

import copy
import json
import re
from pathlib import Path

import pytest

from diffdistill import assets
from diffdistill.eval.evaluate import DETECTOR
from diffdistill.eval.protocols import PROTOCOLS, reference, teacher_rows
from diffdistill.registry import get_method
from diffdistill.schedules import EDM
from diffdistill.testing import gaussian, run_method, student_samples

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_method_is_short_and_distils_a_gaussian(tmp_path):
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "class Mine" in c)
    assert len(code.splitlines()) < 60
    file = tmp_path / "my_method.py"
    file.write_text(code)
    teacher = gaussian((0.6,), 0.4, EDM(t_max=5.0))
    engine = run_method(get_method(f"{file}:Mine"), teacher, steps=300, teacher_steps=30)
    assert student_samples(engine, 20_000).mean().item() == pytest.approx(0.6, abs=0.05)
    assert student_samples(engine, 20_000).std().item() > 0.25  # the teacher as it is has 0.03


def test_the_two_commands_are_there():
    assert "pip install -e . && accelerate launch -m diffdistill.train recipe=quickstart" in README
    assert 'pip install -e ".[test]" && pytest' in README


def test_the_tables_are_those_of_the_stored_results():
    from diffdistill.eval import tables

    assert tables.updated(README) == README


@pytest.mark.parametrize("name", assets.names("teachers"))
def test_the_cards_say_what_the_teachers_score(name):
    from diffdistill.eval import tables

    card = assets.path("teachers", name, "README.md").read_text()
    assert tables.updated_card(name, card) == card
    rows = json.loads(assets.path("reference", f"{name}.json").read_text())["rows"]
    full = max(rows, key=lambda row: row["steps"])
    for r in full["records"]:
        assert f"| {r['metric']} | {r['value']:.4g} | {r['n']} | {r['m']} | {r['protocol']}" in card
    assert f"{full['steps']} steps, {full['records'][0]['nfe']} network passes" in card


def test_wrong_rows_of_other_weights_are_not_put_into_a_card(monkeypatch, tmp_path):
    from diffdistill.eval import tables

    path = assets.path
    own = lambda *parts: tmp_path / parts[1] if parts[0] == "reference" else path(*parts)  # noqa: E731
    monkeypatch.setattr(tables.assets, "path", own)
    with pytest.raises(ValueError, match=r"no rows of the weights .* --rows shapes-sd"):
        tables.scores("shapes-sd")
    stored = json.loads(path("reference", "shapes-sd.json").read_text()) | {
        "weights": {"unet": "0"}
    }
    (tmp_path / "shapes-sd.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"no rows of the weights .* --rows shapes-sd"):
        tables.scores("shapes-sd")


def stored_rows():
    """(protocol, row) of every teacher and student that ships."""
    rows = [(name, row) for name in PROTOCOLS for row in teacher_rows(name)]
    for file in sorted(assets.path("results").glob("*.json")):
        result = json.loads(file.read_text())
        rows.append((result["protocol"], result))
    return rows


def test_the_stored_results_rest_on_the_shipped_references_and_judges():
    nets = {name: rules.net().name for name, rules in PROTOCOLS.items()}
    for protocol, row in stored_rows():
        for r in row["records"]:
            assert r["reference"] in ("", reference(protocol).digest)
            judge = DETECTOR if r["metric"] == "geneval" else nets[protocol]
            assert r["feature_net"] == judge


@pytest.mark.parametrize(
    ("protocol", "teacher", "goals"),
    [
        ("shapes-v1", "shapes-sd", {"geneval": 0.90}),
        ("fashion-v1", "fashion-edm", {"accuracy": 0.90}),
    ],
)
def test_shipped_teachers_are_worth_distilling(protocol, teacher, goals):
    rows = [row for row in teacher_rows(protocol) if row["pipeline"] == teacher]
    full = max(rows, key=lambda row: row["steps"])
    values = {r["metric"]: r["value"] for r in full["records"]}
    assert all(values[metric] >= goal for metric, goal in goals.items())
    if teacher == "fashion-edm":
        assert values["fd"] <= 3 * reference(protocol).floor


def test_wrong_rows_of_another_reference_share_no_table(monkeypatch):
    from diffdistill.eval import tables

    rows = teacher_rows("shapes-v1")
    rows[2] = copy.deepcopy(rows[2])
    rows[2]["records"][1]["reference"] = "another"
    monkeypatch.setattr(tables, "teacher_rows", lambda name: rows * (name == "shapes-v1"))
    with pytest.raises(ValueError, match="kd of teacher `shapes-dit` under shapes-v1 cannot be"):
        tables.results()
