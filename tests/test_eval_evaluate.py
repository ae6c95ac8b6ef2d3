"""`evaluate` end to end, with pictures of the world itself in place of a pipeline's samples."""

import dataclasses
import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffdistill import assets
from diffdistill.checkpoint import sha256
from diffdistill.data import shapes
from diffdistill.eval import (
    clip,
    diversity,
    fid,
    geneval,
    kid,
    metrics,
    prdc,
    protocols,
    shapes_detector,
)
from diffdistill.eval import evaluate as evaluate_module
from diffdistill.eval.evaluate import GROUPS, evaluate
from diffdistill.eval.features import FashionClassifier, ShapesClip


class Fake:
    """Returns draw(seeds) for any conditions, and remembers these."""

    pipe = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)

    def __init__(self, draw, protocol="shapes-v1"):
        self.draw, self.asked = draw, []
        self.info = {"name": "fake", "protocol": protocol, "steps": 1, "guidance": 0.0}

    def nfe(self, steps=None, guidance=None):
        return steps or 1

    def sample(self, conditions, seeds, *, steps=None, guidance=None, batch=128):
        self.asked += list(zip(conditions, seeds, strict=True))
        return self.draw(seeds)


def real(seeds):
    return shapes.render([shapes.scene(i, "test") for i in seeds])


def values(result):
    return {r["metric"]: r["value"] for r in result["records"]}


def test_real_pictures_get_full_marks_and_swapped_ones_do_not(tmp_path):
    generator = Fake(real)
    result = evaluate(generator, n=600, out=tmp_path / "x.json")
    assert (
        generator.asked[7] == (shapes.scene(7, "test").caption, 7) and len(generator.asked) == 600
    )
    good = values(result)
    assert list(good) == list(protocols.get("shapes-v1").metrics)
    assert good["geneval"] == 1 and set(result["tasks"]) == set(shapes.TASKS)
    assert good["precision"] > 0.9 and good["recall"] > 0.9 and abs(good["kd"]) < 0.1
    assert (
        len(result["verdicts"]) == 60 and result["verdicts"][0]["prompt"] == generator.asked[0][0]
    )
    assert json.loads((tmp_path / "x.json").read_text())["records"] == result["records"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.json", "x.png"]

    swapped = Fake(lambda seeds: real([i + 1 for i in seeds]))
    bad = values(evaluate(swapped, n=600, metrics=["fid", "clip", "geneval"]))
    assert bad["geneval"] < 0.3 and bad["clip"] < good["clip"] - 0.2
    assert bad["fd"] < 1.5 * good["fd"]  # the pictures themselves are as good


def test_records_say_what_the_number_rests_on():
    result = evaluate(Fake(real), n=60, steps=3)
    by_metric = {r["metric"]: r for r in result["records"]}
    reference = protocols.reference("shapes-v1")
    stored = len(reference.features)
    assert {k: by_metric[k]["m"] for k in ("fd", "kd", "recall", "clip", "geneval")} == {
        "fd": 10_000, "kd": stored, "recall": 60, "clip": 0, "geneval": 0,
    }  # fmt: skip
    assert by_metric["fd"]["reference"] == reference.digest and not by_metric["clip"]["reference"]
    fd = by_metric["fd"]
    assert (fd["protocol"], fd["n"], fd["steps"], fd["nfe"]) == ("shapes-v1/n=60", 60, 3, 3)
    assert fd["feature_net"] == ShapesClip().name and fd["device"] == "cpu"
    assert {r["resize"] for r in result["records"]} == {"none"}


def noisy(seeds):
    noise = np.stack([np.random.default_rng(i).integers(0, 80, (3, 32, 32)) for i in seeds])
    return (real(seeds).int() + torch.from_numpy(noise)).clamp(0, 255).byte()


def test_numbers_are_those_of_the_functions_on_the_same_features():
    n, limit = 300, shapes_detector.THRESHOLD
    images, net, reference = noisy(range(n)), ShapesClip(), protocols.reference("shapes-v1")
    features = np.concatenate([net.features(part) for part in images.split(256)])
    scenes = [shapes.scene(i, "test") for i in range(n)]
    verdicts = []
    for scene, found in zip(scenes, shapes_detector.detect(images), strict=True):
        one = geneval.verdict(scene.record, found, threshold=limit, counting_threshold=limit)
        verdicts.append((scene.record["tag"], one.correct))
    want = {
        "fd": fid.frechet_distance(reference.mu, reference.cov, *fid.mean_and_cov(features)),
        "kd": kid.kernel_distance(reference.features, features)[0],
        **prdc.prdc(reference.features[:n], features),
        "clip": clip.clip_score(features, net.text([s.caption for s in scenes])),
        "geneval": geneval.overall(geneval.task_scores(verdicts)),
    }
    result = evaluate(Fake(noisy), n=n)
    rows = protocols.get("shapes-v1").repeated([s.caption for s in scenes])
    captions = [scenes[i].caption for i in rows]
    want["diversity"] = diversity.pairwise_cosine(features[rows], captions)
    want["vendi_prompt"] = diversity.vendi_within(features[rows], captions)
    assert list(values(result)) == list(want) and len(rows) >= 16
    assert values(result) == pytest.approx(want, rel=1e-9)
    assert 0.02 < want["geneval"] < 0.98
    assert result["kd_std"] > 0 and list(result["tasks"]) == list(shapes.TASKS)


def test_groups_are_the_registrys_and_cover_the_protocols():
    assert list(GROUPS) == list(metrics.METRICS) and GROUPS["prdc"][1] == "recall"
    used = {number for rules in protocols.PROTOCOLS.values() for number in rules.metrics}
    assert {name for name, numbers in GROUPS.items() if {*numbers} & used} == {*metrics.WORLDS}
    known = {number for numbers in GROUPS.values() for number in numbers}
    assert all(set(rules.metrics) <= known for rules in protocols.PROTOCOLS.values())
    few = evaluate(Fake(real), n=60, metrics=["clip", "prdc"])
    assert list(values(few)) == ["clip", "precision", "recall", "density", "coverage"]
    assert "verdicts" not in few


def test_rows_of_a_teacher_are_made_again_while_the_reference_stays(monkeypatch, capsys):
    made = []
    for name in ("reference", "teacher_rows"):
        monkeypatch.setattr(protocols, f"write_{name}", lambda p, name=name: made.append((name, p)))
    monkeypatch.setattr(protocols, "reference", lambda name: SimpleNamespace(floor=0.3))
    protocols.main(["--rows", "shapes-sd"])
    protocols.main(["shapes-v1"])
    assert made == [("teacher_rows", "shapes-sd"), ("reference", "shapes-v1")]
    for argv in (["--rows", "shapes-v1"], ["shapes-sd"], ["--curve", "shapes-v1"]):
        with pytest.raises(ValueError, match=r"unknown (teacher|protocol)"):
            protocols.main(argv)


# ---- diversity within a prompt ------------------------------------------------------------

WITHIN = ["diversity", "vendi_prompt"]


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_diversity_costs_no_sample_and_compares_as_many_of_each_prompt(name):
    rules = protocols.get(name)
    conditions = rules.conditions(rules.n)
    rows = rules.repeated(conditions)
    assert rows == sorted(set(rows)) and rows[-1] < rules.n
    counts = Counter(conditions[i] for i in rows)
    assert set(counts.values()) == {{"shapes-v1": 8, "fashion-v1": 500}[name]}
    assert len(counts) == {"shapes-v1": 94, "fashion-v1": 10}[name]
    one = conditions[rows[0]]
    same = [i for i, c in enumerate(conditions) if c == one]
    assert [i for i in rows if conditions[i] == one] == same[: counts[one]]
    assert tuple(rules.metrics[-2:]) == tuple(WITHIN)


def test_a_collapsed_student_has_no_diversity_and_the_other_numbers_stay():
    """One picture for each caption: every picture is right, and all of a caption are equal."""
    n = 300
    captions = [shapes.scene(i, "test").caption for i in range(n)]
    first = {c: i for i, c in reversed(list(enumerate(captions)))}
    varied, collapsed = Fake(real), Fake(lambda seeds: real([first[captions[i]] for i in seeds]))
    names = ["fid", "kid", "prdc", "clip", "diversity", "vendi-prompt"]
    good, bad = evaluate(varied, n=n, metrics=names), evaluate(collapsed, n=n, metrics=names)
    assert len(varied.asked) == n == len(collapsed.asked)
    assert values(bad)["clip"] == pytest.approx(values(good)["clip"], abs=0.01)
    assert values(bad)["diversity"] == pytest.approx(0, abs=1e-9)
    assert values(bad)["vendi_prompt"] == pytest.approx(1, abs=1e-9)
    assert values(good)["diversity"] > 0.02 and 1.1 < values(good)["vendi_prompt"] < 8

    few = Fake(real)
    without = evaluate(few, n=n, metrics=names[:-2])
    assert without["records"] == good["records"][:-2] and few.asked == varied.asked  # to the bit
    count = len(protocols.get("shapes-v1").repeated(captions))
    for r in good["records"][-2:]:
        assert (r["n"], r["m"], r["reference"]) == (count, 0, "") and count % 8 == 0
        assert r["labels"].endswith("; the first 8 of each") and r["protocol"] == "shapes-v1/n=300"
    alone = evaluate(Fake(real), n=n, metrics=["vendi-prompt"])
    assert alone["records"] == good["records"][-1:]


def test_too_few_samples_of_a_prompt_leave_diversity_out_or_are_refused():
    result = evaluate(Fake(real), n=60)
    assert not set(WITHIN) & set(values(result))
    said = "no prompt has 8 of the 60 samples"
    assert result["left_out"] == {"diversity": said, "vendi-prompt": said}
    assert "left_out" not in evaluate(Fake(real), n=60, metrics=["clip"])
    generator = Fake(real)
    with pytest.raises(ValueError, match=f"metric diversity: {said}. Give more; shapes-v1 has"):
        evaluate(generator, n=60, metrics=["clip", "diversity"])
    assert not generator.asked


def test_grey_pictures_score_nothing():
    grey = values(
        evaluate(Fake(lambda seeds: torch.full((len(seeds), 3, 32, 32), 135).byte()), n=60)
    )
    assert grey["geneval"] == grey["recall"] == 0 and grey["fd"] > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n": 1}, "Give 2 or more"), ({"protocol": "shapes-v2"}, "Did you mean 'shapes-v1'"),
     ({"metrics": ["accuracy"]}, "no metric 'accuracy'")],
)  # fmt: skip
def test_bad_requests_fail_before_sampling(change, message):
    generator = Fake(real)
    with pytest.raises(ValueError, match=message):
        evaluate(generator, **change)
    assert not generator.asked


def test_another_network_than_the_references_is_refused_before_sampling(monkeypatch):
    other = dataclasses.replace(protocols.reference("shapes-v1"), feature_net="shapes-clip:0")
    monkeypatch.setattr(protocols, "reference", lambda name: other)
    generator = Fake(real)
    with pytest.raises(ValueError, match="made with shapes-clip:0"):
        evaluate(generator, n=60)
    assert not generator.asked


def test_the_clip_knows_which_caption_is_whose():
    net = ShapesClip()
    scenes = [shapes.scene(i, "test") for i in range(300)]
    image, text = net.features(shapes.render(scenes)), net.text([s.caption for s in scenes])
    assert image.dtype == text.dtype == np.float64 and image.shape == text.shape == (300, 96)
    few = [scenes[i].caption for i in (5, 0, 5, 3, 0)]  # each is read once, and stands where asked
    assert len({*few}) == 3 and np.allclose(net.text(few), text[[5, 0, 5, 3, 0]], rtol=0, atol=1e-5)
    rng = np.random.default_rng(0)
    wrong = net.text([shapes.altered_caption(s.record, rng) for s in scenes])
    right, altered = ((image * t).sum(1) / np.linalg.norm(t, axis=1) for t in (text, wrong))
    assert (right > altered).mean() > 0.8


def toy(count, seed):
    """Ten kinds of 28 x 28 pictures: a bright row per class, noise."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, 1, 28, 28))
    for i in range(count):
        images[i, :, 2 * (i % 10) : 2 * (i % 10) + 4] += 150
    return torch.from_numpy(images).byte()


def test_fashion_protocol_with_its_own_files(tmp_path, monkeypatch):
    torch.manual_seed(0)
    FashionClassifier().save(tmp_path / "judge")
    net = FashionClassifier.load(tmp_path / "judge")
    assert net.name.startswith("fashion-classifier:") and len(net.name) == 27
    rules = dataclasses.replace(
        protocols.get("fashion-v1"), n=100, net=lambda: net,
        real=lambda split: toy(*{"train": (400, 0), "test": (150, 1)}[split]),
    )  # fmt: skip
    monkeypatch.setitem(protocols.PROTOCOLS, "fashion-v1", rules)
    monkeypatch.setattr(protocols.assets, "path", lambda *parts: tmp_path.joinpath(*parts))
    protocols.reference.cache_clear()
    protocols.write_reference("fashion-v1")
    generator = Fake(lambda seeds: toy(150, 1)[list(seeds)], "fashion-v1")
    result = evaluate(generator)
    protocols.reference.cache_clear()
    assert [c for c, _ in generator.asked[:12]] == [*range(10), 0, 1]
    assert result["protocol"] == "fashion-v1"  # n is the protocol's, so the floor is met exactly
    got = values(result)
    assert got["fd"] == pytest.approx(result["floor_fd"], rel=1e-9)
    images = toy(150, 1)[:100]
    right = net.predict(images) == torch.arange(100) % 10
    assert got["accuracy"] == pytest.approx(right.double().mean().item())
    features = net.features(toy(400, 0)), net.features(images)
    assert got["fd"] == pytest.approx(fid.frechet_distance_of_features(*features), rel=1e-6)


@pytest.mark.parametrize("make", [ShapesClip, FashionClassifier.load])
def test_wrong_precision_of_a_caller_does_not_reach_the_judges(make):
    net, shape = make(), (3, 32, 32) if make is ShapesClip else (1, 28, 28)
    images = torch.arange(4 * math.prod(shape)).reshape(4, *shape).remainder(251).byte()
    before = net.features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(net.features(images), before)
        if make is ShapesClip:
            inside = net.text(["a red circle"])
        else:
            inside = net.confidence(images).numpy()
    outside = net.text(["a red circle"]) if make is ShapesClip else net.confidence(images).numpy()
    assert np.array_equal(inside, outside)


def test_samples_of_another_scheduler_are_others():
    from diffdistill.pipelines.loading import load_pipeline

    pipe = load_pipeline("fashion-edm").pipe
    first = evaluate_module.digest(pipe, [])
    assert evaluate_module.digest(load_pipeline("fashion-edm").pipe, []) == first
    pipe.scheduler.register_to_config(s_churn=0.0)
    second = evaluate_module.digest(pipe, [])
    pipe.register_to_config(sigma_data=0.6)
    assert len({first, second, evaluate_module.digest(pipe, []), 0}) == 4


def test_wrong_results_are_never_overwritten(tmp_path):
    out, first = tmp_path / "x.json", Fake(real)
    ask = {"metrics": ["geneval"], "n": 60, "out": out, "samples": tmp_path}
    made = evaluate(first, **ask)
    assert evaluate(Fake(real), **ask)["records"] == made["records"]
    assert (tmp_path / made["samples"] / "000000.npy").is_file()
    other, kept = Fake(real), out.read_text()
    other.info = other.info | {"times": [999]}
    for generator, change, words in (
        (other, {}, "another samples: 'fake-"),
        (first, {"n": 61}, "another protocol: 'shapes-v1/n"),
    ):
        generator.asked.clear()
        with pytest.raises(ValueError, match=f"x.json holds the numbers of {words}"):
            evaluate(generator, **ask | change)
        assert not generator.asked and out.read_text() == kept


def test_missing_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors is missing"):
        ShapesClip(tmp_path)
    monkeypatch.setattr(protocols.assets, "path", lambda *parts: tmp_path.joinpath(*parts))
    protocols.reference.cache_clear()
    with pytest.raises(ValueError, match=r"shapes-v1.npz is missing"):
        protocols.reference("shapes-v1")
    assert protocols.teacher_rows("shapes-v1") == []


def test_every_shipped_teacher_has_rows_of_its_protocol():
    judged = {name: set(protocols.rated(name)) for name in protocols.PROTOCOLS}
    for name in assets.names("teachers"):
        info = json.loads(assets.path("teachers", name, "diffdistill.json").read_text())
        assert name in judged[info["protocol"]]
    assert sum(map(len, judged.values())) == len(assets.names("teachers"))


@pytest.mark.parametrize("name", assets.names("teachers"))
def test_teacher_rows_and_card_are_those_of_the_shipped_weights(name):
    folder = assets.path("teachers", name)
    said = json.loads((folder / "diffdistill.json").read_text())["weights"]
    files = sorted(folder.rglob("*.safetensors"))
    assert said == {str(f.relative_to(folder)): sha256(f)[:12] for f in files}
    rows = json.loads(assets.path("reference", f"{name}.json").read_text())
    assert rows["weights"] == said
    curve = assets.path("reference", f"{name}-guidance.json")
    assert not curve.is_file() or json.loads(curve.read_text())["weights"] == said


# ---- the teacher's curve over guidance scales ---------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A teacher of 25 steps with guidance 3, its rows, and what is asked of `evaluate`."""
    from diffdistill.eval import evaluate as module
    from diffdistill.pipelines import loading

    info = {"weights": {"unet": "1"}, "steps": 25}
    asked = []

    def row(steps=25, guidance=3.0):
        numbers = [{"metric": "fd", "value": 9.0, "reference": "r", "guidance": guidance}]
        return {"protocol": "shapes-v1", "steps": steps, "records": numbers}

    def measure(generator, **how):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(how)
        return row(**how) | {"verdicts": []}

    monkeypatch.setattr(module, "evaluate", measure)
    monkeypatch.setattr(loading, "load_pipeline", lambda name: SimpleNamespace(info=info))
    monkeypatch.setattr(protocols, "reference", lambda name: SimpleNamespace(digest="r"))
    monkeypatch.setattr(protocols.assets, "path", lambda *parts: tmp_path.joinpath(*parts))
    (tmp_path / "reference").mkdir()
    rows = {"weights": {"unet": "1"}, "rows": [row(4), row(25)]}
    (tmp_path / "reference" / "shapes-sd.json").write_text(json.dumps(rows))
    monkeypatch.setattr(protocols.assets, "names", lambda kind: ["shapes-sd"])
    return SimpleNamespace(
        info=info, asked=asked, file=tmp_path / "reference" / "shapes-sd-guidance.json"
    )


def curve_of(file):
    stored = json.loads(file.read_text())
    return stored["weights"], [row["records"][0]["guidance"] for row in stored["rows"]]


def test_a_curve_takes_the_teachers_own_row_and_continues(shipped):
    protocols.main(["--curve", "shapes-sd", "--guidance", "3,1,2"])
    assert shipped.asked == [{"guidance": 1.0}, {"guidance": 2.0}]  # 3 is the teacher's own
    assert curve_of(shipped.file) == ({"unet": "1"}, [1, 2, 3])
    assert all("verdicts" not in row for row in json.loads(shipped.file.read_text())["rows"])
    with pytest.raises(KeyboardInterrupt):
        protocols.write_curve("shapes-sd", (4.0, 2.0, 6.0))
    assert shipped.asked[2:] == [{"guidance": 4.0}]  # stored before the interruption
    assert curve_of(shipped.file)[1] == [1, 2, 3, 4]


@pytest.mark.parametrize("change", ["weights", "reference"])
def test_wrong_rows_of_another_teacher_or_judge_are_not_taken(shipped, monkeypatch, change):
    protocols.write_curve("shapes-sd", (1.0,))
    if change == "weights":
        shipped.info["weights"] = {"unet": "2"}
    else:
        monkeypatch.setattr(protocols, "reference", lambda name: SimpleNamespace(digest="q"))
    protocols.write_curve("shapes-sd", (1.0, 3.0))
    assert shipped.asked[1:] == [{"guidance": 1.0}, {"guidance": 3.0}]
    assert curve_of(shipped.file) == (shipped.info["weights"], [1, 3])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--guidance", "1,x"], "--guidance 1,x. Give numbers"),
        (["--guidance", "0.5"], "guidance 0.5. Allowed: 1"),
        (["shapes-sx"], "Did you mean 'shapes-sd'"),
    ],
)
def test_mistakes_about_curves_are_told_before_anything_is_drawn(shipped, argv, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        protocols.main(["--curve", *argv])
    assert not shipped.asked and not shipped.file.exists()
