"""The report: what it says, what it must not compare, and that it opens offline."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data import shapes
from diffdistill.eval import report
from diffdistill.eval.report import chart, comparison, key, read_run, thin, ticks, write_report
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


def evaluation(fd, geneval, clip=0.31, **how):
    made = [
        record("fd", fd, **how), record("kd", fd / 900, **how),
        record("precision", 0.81, **how), record("recall", 0.64, **how),
        record("coverage", 0.88, **how), record("clip", clip, **how),
        record("geneval", geneval, **how),
    ]  # fmt: skip
    tasks = dict(zip(shapes.TASKS, (0.97, 0.9, 0.71, 0.99, 0.78, 0.83), strict=True))
    return {"pipeline": "student", "protocol": "shapes-v1", "records": made, "tasks": tasks}


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """Teacher rows of the protocol, in an assets folder of our own."""
    rows = [
        evaluation(fd, g, steps=k, nfe=2 * k, guidance=3.0)
        for k, fd, g in ((25, 9.8, 0.934), (1, 244.0, 0.02), (2, 131.0, 0.11), (4, 55.0, 0.46))
    ]
    folder = tmp_path / "assets" / "reference"
    folder.mkdir(parents=True)
    (folder / "shapes-v1.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(report.assets, "path", lambda *p: tmp_path.joinpath("assets", *p))


def fake_run(path, *, scenes=24, fd=12.3456, geneval=0.853):
    """A finished run with pictures, curves, three evaluations and a hostile prompt."""
    path.mkdir(parents=True)
    (path / "DONE").write_text("{}\n")
    (path / "config.yaml").write_text(f"recipe: quickstart\ndata:\n  prompt: '{EVIL}'\n")
    (path / "config.lock.json").write_text(json.dumps({"versions": {"torch": "2.14"}}, indent=1))
    rng = np.random.default_rng(0)
    real = shapes.render([shapes.scene(i, "test") for i in range(60)])

    def noisy(images, amount):
        noise = torch.from_numpy(rng.normal(size=images.shape) * amount)
        return (images + noise).clamp(0, 255).to(torch.uint8)

    save_grid(real[:scenes], 8, path / "samples" / "teacher_000000.png")
    for step, amount in ((0, 90), (250, 50), (500, 30), (750, 15), (1000, 8)):
        save_grid(noisy(real[:scenes], amount), 8, path / "samples" / f"student_{step:06d}.png")
    verdicts = []
    for i in range(60):
        what = shapes.scene(i, "test").record
        correct = bool(rng.random() < 0.85)
        verdicts.append({
            "index": i, "prompt": EVIL if i == 0 else what["prompt"], "tag": what["tag"],
            "correct": correct, "reason": "" if correct else "expected 2 circles, found 1",
        })  # fmt: skip
    (path / "eval").mkdir()
    for step, value, score in ((0, 250.0, 0.03), (500, 31.0, 0.64), (1000, fd, geneval)):
        made = evaluation(value, score) | {"verdicts": verdicts}
        (path / "eval" / f"step_{step:06d}.json").write_text(json.dumps(made))
    save_grid(noisy(real, 8), 10, path / "eval" / "step_001000.png", zoom=3)
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
        "1 step: FD 12.3 vs the teacher's 9.8 at 25 steps (n 5,000); GenEval 0.853 vs the "
        "teacher's 0.934 (n 600); 50x fewer network passes."
    )
    assert data["runs"][0]["cost"]["network_passes"] == 1_234_567
    assert [row["label"] for row in data["teacher"]] == [
        "teacher, 1 step", "teacher, 2 steps", "teacher, 4 steps", "teacher, 25 steps",
    ]  # fmt: skip
    picture = Image.open(page.parent / "report.png")
    assert picture.width > 800 and np.asarray(picture).std() > 10


def test_page_is_self_contained_and_escapes_what_it_is_given(tmp_path, teacher):
    text = write_report([fake_run(tmp_path / "run")]).read_text()
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;document.title=&quot;owned") >= 2  # prompt and configuration
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:image/png)[^"'>\s]+""", text)
    assert "http:" not in text and "@import" not in text and "<link" not in text
    for wanted in (
        "student before training", "teacher, 25 steps", "1,234,567", "3 min 34 s", "2.41 GiB",
        "n 5,000", "10,000 reference images", NET, "left out: 1",
        "&quot;torch&quot;: &quot;2.14&quot;",
        "GenEval, n 600", "loss fake_score/dsm", "gradient norm", "expected 2 circles, found 1",
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
    assert sorted(values[0]) == ["", "12.3"] and sorted(values[1]) == ["", "11"]
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
    assert text == "1 step: FD 12 (n 500; no comparable number of the teacher)."


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


def test_several_runs_share_one_table(tmp_path, teacher):
    runs = [fake_run(tmp_path / "one"), fake_run(tmp_path / "two", fd=30.0)]
    text = write_report(runs, tmp_path / "both").read_text()
    assert text.count('<tr class="student">') == 2
    assert "From the same noise · one" in text and "From the same noise · two" in text


def test_resumed_log_counts_each_step_once(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("a: 1\n")
    rows = [{"step": 1, "a/x": 1.0}, {"step": 2, "a/x": 2.0}, {"step": 2, "a/x": 5.0}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = read_run(path)
    assert [r["a/x"] for r in run.log] == [1.0, 5.0] and run.damaged == 0


def test_charts_place_points_where_they_belong():
    svg = chart("loss", {"a": [(0, 1.0), (10, 2.0)]})
    (line,) = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in line.split())
    assert (x0, x1) == (42.0, 352.0) and y1 < y0  # larger is higher
    assert "(log)" not in svg and "(log)" in chart("loss", {"a": [(0, 1.0), (1, 100.0)]})
    assert chart("loss", {"a": [(0, math.nan)]}) == ""
    assert ticks(0.0, 1.0, False) == [0.0, 0.5, 1.0] and ticks(-0.1, 2.1, True)[:2] == [1.0, 5.0]
    level = re.findall(
        r'class="level"[^>]* y1="([\d.]+)"', chart("x", {"a": [(0, 1.0), (9, 3.0)]}, level=2.0)
    )
    assert level == ["78.0"]  # half way between top and bottom
    assert thin([(i, float(i)) for i in range(1000)])[0] == (2.0, 2.0)  # mean of 0 .. 4


def test_page_renders_in_a_browser(tmp_path, teacher):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    page = write_report([fake_run(tmp_path / "run")])
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars",
            "--enable-logging=stderr", "--window-size=1100,1400", f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr  # no error of the page itself
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    ink = (np.abs(pixels - pixels[2, 2]).sum(-1) > 60).any(1)  # rows that show something
    assert pixels.shape[:2] == (1400, 1100) and ink.mean() > 0.4
    colourful = np.ptp(pixels, axis=-1) > 80
    assert colourful.sum() > 5000  # the grids are there
