"""The report: what it says, what it must not compare, and that it opens offline."""

import functools
import json
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill import assets
from diffdistill.data import shapes
from diffdistill.eval import figures, report, report_curves
from diffdistill.eval.figures import Line, Panel, running_mean, short, thin
from diffdistill.eval.records import key
from diffdistill.eval.report import write_report
from diffdistill.eval.report_runs import read_run
from diffdistill.eval.report_tables import comparison
from diffdistill.eval.report_teachers import world
from diffdistill.eval.report_words import esc, number
from diffdistill.tracking import save_grid

EVIL = '<script>document.title="owned"</script> & "a red circle"'
NET = "shapes-clip:1f2e3d4c"


def record(metric, value, *, steps=1, nfe=1, guidance=0.0, n=5000, **other):
    base = {
        "metric": metric, "value": value, "protocol": "shapes-v1", "feature_net": NET,
        "resize": "none", "n": n, "m": 10000, "reference": "9a8b7c6d5e4f", "seeds": "i",
        "labels": "prompts", "device": "cpu", "dtype": "float32", "steps": steps, "nfe": nfe,
        "guidance": guidance, "versions": {},
    }  # fmt: skip
    if metric == "geneval":
        base |= {"feature_net": "shapes-detector", "n": 600, "m": 0, "reference": ""}
    return base | other


def evaluation(fd, geneval, clip=0.31, pipeline="student", **how):
    made = [
        record("fd", fd, **how), record("kd", fd / 900, **how),
        record("precision", 0.81, **how), record("recall", 0.64, **how),
        record("coverage", 0.88, **how), record("clip", clip, **how),
        record("geneval", geneval, **how),
    ]  # fmt: skip
    tasks = dict(zip(shapes.TASKS, (0.97, 0.9, 0.71, 0.99, 0.78, 0.83), strict=True))
    return {
        "pipeline": pipeline, "protocol": "shapes-v1", "steps": made[0]["steps"], "records": made,
        "tasks": tasks, "floor_fd": 0.5, "images_per_s": 321.0,
    }  # fmt: skip


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """Teacher rows of the protocol, in an assets folder of our own, which is returned."""
    rows = [
        evaluation(fd, g, pipeline="shapes-sd", steps=k, nfe=2 * k, guidance=3.0)
        for k, fd, g in ((25, 9.8, 0.934), (1, 244.0, 0.02), (2, 131.0, 0.11), (4, 55.0, 0.46))
    ]
    folder = tmp_path / "assets" / "reference"
    folder.mkdir(parents=True)
    (folder / "shapes-sd.json").write_text(json.dumps({"weights": {"unet": "1"}, "rows": rows}))
    monkeypatch.setattr(assets, "path", lambda *p: tmp_path.joinpath("assets", *p))
    return folder


def store_curve(folder, weights="1", **how):
    """The teacher's curve over four guidance scales, stored in another order."""
    rows = [
        evaluation(fd, g / 8 + 0.4, clip, "shapes-sd", steps=25, nfe=50, guidance=g, **how)
        for g, fd, clip in ((3.0, 9.8, 0.33), (1.0, 14.0, 0.24), (7.0, 21.0, 0.36), (2.0, 8.1, 0.3))
    ]
    file = folder / "shapes-sd-guidance.json"
    file.write_text(json.dumps({"weights": {"unet": weights}, "rows": rows}))


@functools.cache
def pictures():
    """Name in the run -> PNG."""
    rng = np.random.default_rng(0)
    real = shapes.render([shapes.scene(i, "test") for i in range(60)])

    def noisy(images, amount):
        noise = torch.from_numpy(rng.normal(size=images.shape) * amount)
        return (images + noise).clamp(0, 255).to(torch.uint8)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_grid(real[:24], 8, path / "samples" / "teacher_000000.png")
        for step, amount in ((0, 90), (250, 50), (500, 30), (750, 15), (1000, 8)):
            save_grid(noisy(real[:24], amount), 8, path / "samples" / f"student_{step:06d}.png")
        save_grid(noisy(real, 8), 10, path / "eval" / "step_001000.png", zoom=3)
        return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*.png")}


def fake_run(path, *, fd=12.3456, geneval=0.853):
    """A finished run with pictures, curves, three evaluations and a hostile prompt."""
    path.mkdir(parents=True)
    (path / "DONE").write_text("{}\n")
    (path / "config.yaml").write_text(f"recipe: quickstart\ndata:\n  prompt: '{EVIL}'\n")
    (path / "config.lock.json").write_text(json.dumps({"versions": {"torch": "2.14"}}, indent=1))
    for name, png in pictures().items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(png)
    rng = np.random.default_rng(0)
    verdicts = []
    for i in range(60):
        what = shapes.scene(i, "test").record
        correct = bool(rng.random() < 0.85)
        verdicts.append({
            "index": i, "prompt": EVIL if i == 0 else what["prompt"], "tag": what["tag"],
            "correct": correct, "reason": "" if correct else "expected 2 circles, found 1",
        })  # fmt: skip
    for step, value, score in ((0, 250.0, 0.03), (500, 31.0, 0.64), (1000, fd, geneval)):
        made = evaluation(value, score) | {"verdicts": verdicts}
        (path / "eval" / f"step_{step:06d}.json").write_text(json.dumps(made))
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(0, 1000, 5):
            row = {
                "step": step, "images": step * 128, "seconds": step * 0.21, "fake_score/lr": 1e-4,
                "fake_score/dsm": 0.6 * math.exp(-step / 300) + 0.1 + 0.02 * rng.normal(),
                "generator/dm": 0.5 + 0.05 * rng.normal(), "student/grad_norm": 2 + rng.random(),
                "generator/gan": 1.1 + 0.1 * rng.normal(),
                "fake_score/grad_norm": 90 * math.exp(-step / 200) + rng.random(),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 1000, "ima')  # killed while writing
    info = {
        "kind": "student", "name": "shapes-sd-dmd-1step", "method": "dmd", "teacher": "shapes-sd",
        "teacher_weights": {"unet": "1"},
        "paper": "Improved Distribution Matching Distillation, arXiv 2405.14867", "steps": 1,
        "train": {
            "steps": 1000, "batch_size": 128, "images": 128_000, "seconds": 214.0,
            "network_passes": 1_234_567, "peak_memory_gib": 2.41,
        },
    }  # fmt: skip
    (path / "student").mkdir()
    (path / "student" / "diffdistill.json").write_text(json.dumps(info))
    return path


def test_verdict_compares_with_the_full_teacher(tmp_path, teacher):
    page = write_report([fake_run(tmp_path / "quickstart-1a2b")])
    assert page == tmp_path / "quickstart-1a2b" / "report" / "index.html"
    data = json.loads((page.parent / "report.json").read_text())
    assert data["runs"][0]["verdict"] == (
        "1 step: FD 12.35 vs the teacher's 9.80 at 25 steps (n 5,000); GenEval 0.853 vs the "
        "teacher's 0.934 (n 600); 50x fewer network passes."
    )
    assert data["runs"][0]["cost"]["network_passes"] == 1_234_567
    assert [row["label"] for row in data["teacher"]] == [
        "shapes-sd, 1 step", "shapes-sd, 2 steps", "shapes-sd, 4 steps", "shapes-sd, 25 steps",
    ]  # fmt: skip
    picture = Image.open(page.parent / "report.png")
    assert picture.width > 800 and np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    "change",
    [{"teacher": "shapes-dit"}, {"teacher_weights": {"unet": "2"}}, {"teacher_weights": None}],
)
def test_wrong_teachers_are_not_compared_with(tmp_path, teacher, change):
    """The rows of the protocol's teacher say nothing about a student of another one."""
    path = fake_run(tmp_path / "run")
    file = path / "student" / "diffdistill.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    said = report.verdict(read_run(path), {"shapes-v1": world("shapes-v1")})
    assert said.count("no comparable number of the teacher") == 2


def test_page_is_self_contained_and_escapes_what_it_is_given(tmp_path, teacher):
    text = write_report([fake_run(tmp_path / "run")]).read_text()
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;document.title=&quot;owned") >= 2  # prompt and configuration
    assert not re.findall(
        r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:image/(?:png|svg\+xml);base64,)[^"'>\s]+""", text
    )
    assert "http:" not in text and "@import" not in text and "<link" not in text
    for wanted in (
        "student before training", "shapes-sd, 25 steps", "1,234,567", "3 min 34 s", "2.41 GiB",
        "n 5,000", "10,000 reference images", NET, "left out: 1",
        "&quot;torch&quot;: &quot;2.14&quot;",
        "GenEval ↑, n 600", "fake_score/dsm", "gradient norm", "expected 2 circles, found 1",
        "321 images/s", "<p>Recall</p>", "default-src 'none'; img-src data:;",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert text.count('class="right"') + text.count('class="wrong"') == 60


def test_numbers_that_differ_in_protocol_n_or_net_never_share_a_column(tmp_path, teacher):
    first = read_run(fake_run(tmp_path / "a"))
    second = read_run(fake_run(tmp_path / "b", fd=11.0))
    newest = second.evals[max(second.evals)]["records"]
    newest[0] |= {"n": 1000}  # FD
    newest[5] |= {"feature_net": "shapes-clip:ffffffff"}  # CLIP score
    html = comparison("shapes-v1", [], [first, second])
    head = re.findall(r"<th>(.*?)</th>", html.split("</thead>")[0])[1:]
    body = [re.findall(r"<td>(.*?)</td>", line) for line in html.split("<tr")[2:4]]
    fd = [i for i, text in enumerate(head) if text.startswith("FD ")]
    assert len(fd) == 2 and sum(t.startswith("CLIP") for t in head) == 2
    assert sum(t.startswith("GenEval") for t in head) == 1
    values = [[row[i] for i in fd] for row in body]
    assert sorted(values[0]) == ["", "12.35"] and sorted(values[1]) == ["", "11.00"]
    assert values[0].index("") != values[1].index("")
    assert key(record("fd", 1.0)) == key(record("fd", 2.0, steps=4, nfe=4))
    for change in ({"n": 1}, {"m": 1}, {"reference": "x"}, {"resize": "clean"}, {"protocol": "p"}):
        assert key(record("fd", 1.0)) != key(record("fd", 1.0) | change)


def test_incomparable_teacher_is_said_so(tmp_path, teacher):
    path = fake_run(tmp_path / "run")
    file = path / "eval" / "step_001000.json"
    data = json.loads(file.read_text())
    data["records"] = [record("fd", 12.0, n=500)]
    file.write_text(json.dumps(data))
    write_report([path], tmp_path / "out")
    text = json.loads((tmp_path / "out" / "report.json").read_text())["runs"][0]["verdict"]
    assert text == "1 step: FD 12.00 (n 500; no comparable number of the teacher)."


def test_unfinished_and_failed_runs_have_a_report(tmp_path, teacher):
    path = tmp_path / "young"
    path.mkdir()
    with pytest.raises(ValueError, match="is not a run"):
        write_report([path])
    with pytest.raises(ValueError, match="no run given"):
        write_report([])
    (path / "config.yaml").write_text("a: 1\n")
    (path / "FAILED").write_text("NonFinite: <b>10</b> updates\n")
    text = write_report([path]).read_text()
    assert "has not been evaluated" in text and ">failed<" in text
    assert "NonFinite: &lt;b&gt;10&lt;/b&gt; updates" in text and "not recorded" in text
    (path / "metrics.jsonl").write_text('{"step": 1, "images": 8, "seconds": 1.0, "a/loss": NaN}\n')
    write_report([path])
    json.loads((path / "report" / "report.json").read_text(), parse_constant=pytest.fail)


def test_diversity_stands_beside_the_teachers_with_its_own_count(tmp_path, teacher):
    def with_diversity(made, value):
        first = made["records"][0]
        made["records"] += [
            first | {"metric": metric, "value": v, "n": 752, "m": 0, "reference": ""}
            for metric, v in (("diversity", value), ("vendi_prompt", 8 * value))
        ]

    run = fake_run(tmp_path / "run")
    file = run / "eval" / "step_001000.json"
    shipped = teacher / "shapes-sd.json"
    rows, made = json.loads(shipped.read_text()), json.loads(file.read_text())
    with_diversity(rows["rows"][0], 0.314)
    with_diversity(made, 0.271)
    shipped.write_text(json.dumps(rows))
    file.write_text(json.dumps(made))
    text = write_report([run]).read_text()
    for head in ("Diversity within a prompt ↑<small>n 752", "Vendi per prompt ↑<small>n 752"):
        assert text.count(head) == 1
    assert "<td>0.314</td><td>2.51</td>" in text and "<td>0.271</td><td>2.17</td>" in text
    assert "teacher 0.314 · n 752" in text  # in its tile


def test_a_report_shows_the_teachers_of_its_runs(tmp_path, teacher):
    stored = json.loads((teacher / "shapes-sd.json").read_text())
    other = [row | {"pipeline": "shapes-dit"} for row in stored["rows"]]
    (teacher / "shapes-dit.json").write_text(json.dumps({"weights": {"net": "2"}, "rows": other}))
    both = world("shapes-v1")
    assert {row.teacher for row in both.teachers} == {"shapes-dit", "shapes-sd"}
    assert world("shapes-v1", {"another"}) == both
    for name in ("shapes-dit", "shapes-sd"):
        known = world("shapes-v1", {name})
        assert [row.teacher for row in known.teachers] == 4 * [name]
        assert [row.records[0]["nfe"] for row in known.teachers] == [2, 4, 8, 50]
        assert f"--curve {name}" in known.missing
    store_curve(teacher)
    assert len(world("shapes-v1").curve) == len(world("shapes-v1", {"shapes-sd"}).curve) == 4
    assert world("shapes-v1", {"shapes-dit"}).curve == []


def test_several_runs_share_one_table(tmp_path, teacher):
    runs = [fake_run(tmp_path / "one"), fake_run(tmp_path / "two", fd=30.0)]
    text = write_report(runs, tmp_path / "both").read_text()
    assert text.count("<i>student</i>") == 2
    assert "From the same noise · one" in text and "From the same noise · two" in text


def with_steps(path, **fds):
    """`path` with evaluations at further numbers of steps, whose files sort behind its own."""
    for count, fd in fds.items():
        k = int(count.removeprefix("k"))
        made = evaluation(fd, 0.9, steps=k, nfe=k)
        (path / "eval" / f"step_001000_{k}step.json").write_text(json.dumps(made))
    return path


def test_further_numbers_of_steps_are_rows_and_points(tmp_path, teacher, sheets):
    path = with_steps(fake_run(tmp_path / "any"), k4=3.5, k2=7.5)
    other = fake_run(tmp_path / "other", fd=30.0)
    run = read_run(path)
    assert sorted(run.evals) == [0, 500, 1000] and run.newest["steps"] == 1
    page = write_report([path])
    said = json.loads((page.parent / "report.json").read_text())["runs"][0]
    assert said["verdict"].startswith("1 step: FD 12.35") and said["records"][0]["steps"] == 1
    assert {k: made[0]["value"] for k, made in said["further"].items()} == {"2": 7.5, "4": 3.5}
    lines = page.read_text().split('<tr class="student">')[1:4]
    found = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line)[:5] for line in lines]
    assert found == [
        ["any <i>student</i>", "1", "1", "0", "12.35"],
        ["any, 2 steps <i>student</i>", "2", "2", "0", "7.50"],
        ["any, 4 steps <i>student</i>", "4", "4", "0", "3.50"],
    ]
    want = ([(1, 12.3456), (2, 7.5), (4, 3.5)], ["1", "2", "4"])
    assert points(sheets[0][0], "any") == want
    sheets.clear()
    drawn_for([path, other])  # both have one step: not joined
    assert points(sheets[0][0], "any") == want and points(sheets[0][0], "other")[0] == [(1, 30.0)]
    sheets.clear()
    drawn_for([path, with_steps(other, k8=2.0)])
    assert points(sheets[0][0], "other")[0] == [(1, 30.0), (8, 2.0)]


def test_wrong_runs_of_one_name_are_told_apart(tmp_path, teacher):
    runs = [fake_run(tmp_path / "one" / "q"), fake_run(tmp_path / "two" / "q", fd=30.0)]
    page = write_report([*runs, runs[0]], tmp_path / "both")
    data = json.loads((page.parent / "report.json").read_text())["runs"]
    assert [run["name"] for run in data] == ["one/q", "two/q"]
    assert "FD 12.35" in data[0]["verdict"] and "FD 30.00" in data[1]["verdict"]
    text = page.read_text()
    assert text.count("<h1>") == 2 and all(esc(run["verdict"]) in text for run in data)
    assert re.findall(r'<tr class="student"><th>([^<]*)</th><td>600', text) == ["one/q", "two/q"]


def test_an_unfinished_run_is_drawn_over_images_or_says_steps(tmp_path, teacher):
    path = fake_run(tmp_path / "run")
    (path / "student" / "diffdistill.json").unlink()
    run = read_run(path)
    fd = run.records[0]
    assert [x for x, _ in report_curves.metric_points(run, fd)] == [0, 500 * 128, 1000 * 128]
    panels = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "small", lambda panel: panels.append(panel) or "")
        report_curves.training_figures(run, {"shapes-v1": world("shapes-v1")})
        assert {panel.x for panel in panels} == {"images seen"}
        panels.clear()
        run.log = [{k: v for k, v in row.items() if k != "images"} for row in run.log]
        report_curves.training_figures(run, {"shapes-v1": world("shapes-v1")})
    assert {panel.x for panel in panels} == {"steps"}
    assert [x for x, _ in panels[0].lines[0].points] == [0, 500, 1000]


def test_the_kernel_distance_has_its_spread(tmp_path, teacher):
    run = read_run(fake_run(tmp_path / "run"))
    run.evals[1000]["kd_std"] = 0.0123
    html = comparison("shapes-v1", [], [run])
    assert "<td>0.014<small>± 0.012</small></td>" in html


def test_resumed_log_counts_each_step_once(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("a: 1\n")
    rows = [{"step": 1, "a/x": 1.0}, {"step": 2, "a/x": 2.0}, {"step": 2, "a/x": 5.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = read_run(path)
    assert [r["a/x"] for r in run.log] == [1.0, 5.0] and run.damaged == 0


# ---- figures ----------------------------------------------------------------------------


def points(panel, label):
    (line,) = [line for line in panel.lines if line.label == label]
    return line.points, list(line.texts)


@pytest.fixture
def sheets(monkeypatch):
    """The panels of every sheet, none of which is drawn."""
    drawn = []
    monkeypatch.setattr(figures, "sheet", lambda panels: drawn.append(panels) or "")
    return drawn


def drawn_for(runs):
    """What is said of the figures of a protocol."""
    read = [read_run(run) for run in runs]
    steps = report_curves.steps_figure("shapes-v1", world("shapes-v1"), read)
    return steps + report_curves.guidance_figure("shapes-v1", world("shapes-v1"), read)


def test_steps_against_quality_has_teacher_and_students(tmp_path, teacher, sheets):
    drawn_for([fake_run(tmp_path / "one"), fake_run(tmp_path / "two", fd=30.0)])
    (panels,) = sheets
    assert [p.title for p in panels] == ["FD ↓", "GenEval ↑", "CLIP score ↑", "Recall ↑"]
    assert all(p.x == "network passes per image" and p.costs for p in panels)
    want = [(2, 244.0), (4, 131.0), (8, 55.0), (50, 9.8)]
    assert points(panels[0], "shapes-sd (teacher)") == (want, ["1", "2", "4", "25"])
    assert points(panels[0], "one")[0] == [(1, 12.3456)]
    assert points(panels[0], "two")[0] == [(1, 30.0)]  # at one cost, so not joined
    assert panels[0].levels == [("real images", 0.5)] and not panels[1].levels


def test_students_of_one_method_at_several_costs_are_joined(tmp_path, teacher, sheets):
    runs = [fake_run(tmp_path / name, fd=fd) for name, fd in (("a", 20.0), ("b", 9.0))]
    file = runs[0] / "eval" / "step_001000.json"
    data = json.loads(file.read_text())
    for r in data["records"]:
        r |= {"steps": 4, "nfe": 4}
    file.write_text(json.dumps(data))
    drawn_for(runs)
    assert points(sheets[0][0], "dmd") == ([(1, 9.0), (4, 20.0)], ["1", "4"])


def test_the_student_is_marked_on_the_teachers_curve(tmp_path, teacher, sheets):
    store_curve(teacher)
    text = drawn_for([fake_run(tmp_path / "run")])
    _, panels = sheets
    assert [(p.x, p.y) for p in panels] == [
        ("CLIP score ↑", "FD ↓"), ("GenEval ↑", "FD ↓"), ("Recall ↑", "Precision ↑"),
    ]  # fmt: skip
    curve = [(0.24, 14.0), (0.3, 8.1), (0.33, 9.8), (0.36, 21.0)]
    label = "shapes-sd (teacher), guidance 1 to 7"
    assert points(panels[0], label) == (curve, ["1", "2", "3", "7"])
    (star,) = [line for line in panels[0].lines if line.star]
    assert (star.label, star.points) == ("run", [(0.31, 12.3456)])
    assert "The teacher has 25 steps" in text and "shapes-sd, n 5,000" in text
    said = f"CLIP score, FD, Recall, Precision: n 5,000, {NET}; GenEval: n 600, shapes-detector."
    assert f"Protocol shapes-v1. {said}" in text
    assert [row.label for row in world("shapes-v1").curve][:2] == [
        "shapes-sd, guidance 1", "shapes-sd, guidance 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "has not been measured for shapes-sd. To make it: python -m"),
        (lambda folder: store_curve(folder, weights="2"), "of shapes-sd is of other weights"),
        (lambda folder: store_curve(folder, feature_net="net:0"), "cannot be compared"),
        (lambda folder: (folder / "shapes-sd.json").unlink(), "nothing ships with protocol"),
    ],
)
def test_wrong_or_missing_curves_are_not_drawn_and_said_so(tmp_path, teacher, sheets, make, words):
    make(teacher)
    text = drawn_for([fake_run(tmp_path / "run")])
    assert "No curve is drawn" in text and words in text
    assert not any(panel.y for panels in sheets for panel in panels)
    assert world("another").curve == []


def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_a_panel_shows_every_finite_point_where_it_belongs():
    ax = axes()
    teacher = Line("teacher", [(2, 244.0), (50, 9.8), (8, math.nan)], texts=["1", "25", "4"])
    levels = [("floor", 0.5), ("lost", math.nan)]
    star = Line("ours", [(1, 12.0)], 0, ["1"], star=True)
    figures.draw(ax, Panel("FD", [teacher, star], "passes", levels=levels, costs=True))
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["teacher"] == [[2, 244.0], [50, 9.8]] and drawn["ours"] == [[1, 12.0]]
    assert [line.get_ydata() for line in ax.lines if line.get_label()[0] == "_"] == [[0.5, 0.5]]
    assert sorted(t.get_text() for t in ax.texts) == ["1", "1", "25", "floor"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "8", "50"]
    low, high = ax.get_ylim()
    assert low < 0.5 and high > 244


def test_axes_are_logarithmic_over_decades_only():
    for values, linear, scale in (
        ((1.0, 100.0), False, "log"), ((1.0, 100.0), True, "linear"),
        ((1.0, 14.0), False, "linear"), ((-1.0, 100.0), False, "linear"),
    ):  # fmt: skip
        ax = axes()
        figures.draw(ax, Panel("", [Line("a", list(enumerate(values)))], "", linear=linear))
        assert ax.get_yscale() == scale


def test_logarithmic_axes_have_plain_numbers():
    ax = axes()
    ax.plot([1, 2], [1.5, 6.6])
    figures.log_axis(ax, [1.5, 6.6])
    ax.figure.draw_without_rendering()
    labels = [tick.get_text() for tick in ax.yaxis.get_ticklabels(which="both")]
    assert {"2", "5"} <= set(labels) and not any("$" in label for label in labels)
    figures.log_axis(axes(), [])  # a plot that has no values yet


def test_texts_stand_beside_their_line():
    ax = axes()
    line = Line("a", [(0, 0.0), (1, 1.0), (2, 0.0)], texts=["p", "q", "r"])
    figures.draw(ax, Panel("", [line], ""))
    offset = {t.get_text(): t.xyann for t in ax.texts}
    assert offset["p"][0] > 0 > offset["p"][1]  # the line rises: to the lower right
    assert offset["r"][0] > 0 and offset["r"][1] > 0  # it falls: to the upper right
    assert abs(offset["q"][0]) < 1e-6 and abs(offset["q"][1]) == pytest.approx(9)


def test_means_and_short_numbers():
    assert thin([(i, float(i)) for i in range(1000)])[0] == (2.0, 2.0)  # mean of 0 .. 4
    assert running_mean([(0, 1.0)] * 23) == []
    flat = running_mean([(i, float(i % 2)) for i in range(48)])  # windows of five
    assert len(flat) == 48 and flat[10] == (10, 0.4) and flat[0] == (0, pytest.approx(1 / 3))
    assert [short(v) for v in (0.5, 12_800, 2e6)] == ["0.5", "12.8k", "2M"]
    shown = [number(v) for v in (0.0, 0.0024, 0.5, 5.7, 1234.5, math.nan, None)]
    assert shown == ["0.000", "0.0024", "0.500", "5.70", "1,234", "not finite", "not finite"]


# ---- a browser --------------------------------------------------------------------------


def look(page, shot):
    """What Chromium says of a page, with a picture of it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={shot.parent / 'profile'}", "--hide-scrollbars",
            "--enable-logging=stderr", "--window-size=1100,2600", f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr[-2000:]
    return done.stderr


def test_page_renders_in_a_browser(tmp_path, teacher):
    """Its policy allows no request, and a request that is refused would be an error here."""
    store_curve(teacher)
    page, shot = write_report([fake_run(tmp_path / "run")]), tmp_path / "shot.png"
    assert len(json.loads((page.parent / "report.json").read_text())["guidance"]) == 4
    assert "CONSOLE" not in look(page, shot)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    ink = (np.abs(pixels - pixels[2, 2]).sum(-1) > 60).any(1)  # rows that show something
    assert pixels.shape[:2] == (2600, 1100) and ink.mean() > 0.4
    colourful = np.ptp(pixels, axis=-1) > 80
    assert colourful.sum() > 5000  # the grids are there


def test_wrong_pages_that_ask_the_network_are_noticed(tmp_path, teacher):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("a: 1\n")
    page = write_report([path])
    text = page.read_text().replace("</main>", '<img src="https://example.invalid/x.png"></main>')
    page.write_text(text)
    assert "Content Security Policy" in look(page, tmp_path / "shot.png")
