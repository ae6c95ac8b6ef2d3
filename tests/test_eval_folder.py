"""Folders of images under the protocols of papers, with small stub networks; and GenEval's."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill import cli
from diffdistill.data import shapes
from diffdistill.eval import (
    fid,
    folder,
    geneval_folder,
    kid,
    metrics,
    networks,
    pixels,
    prdc,
    preference,
    protocols,
    questions,
    statistics,
    weights,
)
from diffdistill.eval.records import comparable

TF1 = "inception-legacy_tensorflow"
MIX = np.random.default_rng(7).normal(size=(12, 5))


class Stub:
    """Means of quadrants, mixed; it remembers the images."""

    resize = "stub-2"

    def __init__(self, path):
        self.name, self.seen = f"stub:{weights.digest(path)[:8]}", []

    def features(self, images):
        self.seen += list(images)
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)
        return np.tanh(quarters.numpy() / 60 - 2) @ MIX


class Taps(Stub):
    def taps(self, images):
        features = self.features(images)
        return {"pool3": features, "logits": features[:, :3], "spatial": features[:, 1:]}


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """Every Inception is a stub whose weights file is given; protocols are of 24 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    Path("weights.pt").write_bytes(b"weights")
    made = []
    for name, (source, _) in list(networks.NETWORKS.items()):
        if source.startswith("inception"):
            kind = Taps if name == "inception-adm" else Stub
            build = lambda path, device, kind=kind: made.append(kind(path)) or made[-1]  # noqa: E731
            monkeypatch.setitem(networks.NETWORKS, name, (source, build))
    for name, rules in list(protocols.FOLDERS.items()):
        small = {"n": 24 if rules.n else 0, "m": 100 if rules.m else 0}
        monkeypatch.setitem(protocols.FOLDERS, name, replace(rules, **small))
    return made


def images(n, size=(32, 32), seed=0):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (n, 3, 2, 2)).repeat(size[0] // 2, 2).repeat(size[1] // 2, 3)
    noisy = base * 3 // 4 + rng.integers(0, 64, (n, 3, *size))
    return torch.from_numpy(noisy).byte()


def put(place, batch, start=0, ending="png"):
    for i, image in enumerate(batch, start):
        file = Path(place, f"{i // 10:02}", f"{i:05}.{ending}")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return place


def stats(file, n=0, d=5, seed=1, **more):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(100, d))
    np.savez(file, mu=real.mean(0), sigma=np.cov(real.T), n=n, **more)
    return file


def command(*argv):
    return cli.main(["evaluate", *map(str, argv)])


GIVEN = ("--weights", "inception-torchscript=weights.pt")
EDM = ("--protocol", "edm-cifar10", *GIVEN)


def run(capsys, *argv):
    assert command(*argv) == 0, capsys.readouterr().err
    *_, file = capsys.readouterr().out.splitlines()
    return json.loads(Path(file).read_text()) if file.endswith(".json") else file


def refused(capsys, *argv):
    assert command(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("diffdistill: ") and said.count("\n") == 1
    return said


# ---- named protocols --------------------------------------------------------------------


def test_the_table_is_that_of_the_papers():
    table = {name: (r.network, r.view, r.n, r.m, r.side) for name, r in protocols.FOLDERS.items()}
    clean = "inception-clean"
    assert table == {
        "edm-cifar10": (TF1, None, 50_000, 50_000, 32),
        "edm-imagenet64": (TF1, None, 50_000, 1_281_167, 64),
        "edm2-imagenet512": (TF1, None, 50_000, 1_281_167, 512),
        "adm-imagenet256": ("inception-adm", None, 50_000, 1_281_167, 256),
        "coco2014-30k": (clean, ("lanczos", 256), 30_000, 40_504, 0),
        "coco2014-10k-sdxl": (clean, ("lanczos", 512), 10_000, 10_000, 0),
        "coco2014-10k-sdxl-patch": (clean, ("patch", 299), 10_000, 10_000, 0),
        "coco2017-5k": (clean, ("lanczos", 256), 5000, 5000, 0),
        "mjhq30k-cleanfid": (clean, None, 30_000, 30_000, 1024),
        "mjhq30k-sana": ("inception-legacy_pytorch", ("short_side", 512), 30_000, 30_000, 0),
        "hpsv2-3200": ("", None, 3200, 0, 0),
        "custom-folder": ("", None, 0, 0, 0),
        "custom-stats": ("", None, 0, 0, 0),
    }
    for rules in protocols.FOLDERS.values():
        assert not rules.network or rules.network in networks.NETWORKS
        assert not rules.view or callable(getattr(pixels, rules.view[0]))
        assert metrics.needed(rules.metrics)
    assert [n for n, r in protocols.FOLDERS.items() if r.lossy[0]] == ["mjhq30k-sana"]
    edm = ["edm-cifar10", "edm-imagenet64", "edm2-imagenet512"]
    assert [n for n, r in table_of("lossy") if not r[1]] == [*edm, "adm-imagenet256"]
    assert [n for n, r in table_of("subset") if r] == [*edm, "custom-folder", "custom-stats"]


def table_of(name):
    return [(protocol, getattr(rules, name)) for protocol, rules in protocols.FOLDERS.items()]


def test_every_protocol_of_the_papers_has_its_id():
    wanted = {
        "edm-cifar10", "edm-imagenet64", "edm2-imagenet512", "adm-imagenet256", "coco2014-30k",
        "coco2014-10k-sdxl", "coco2017-5k", "mjhq30k-cleanfid", "mjhq30k-sana", "geneval",
        "geneval2", "dpg", "hpsv2-3200", "vbench", "custom-folder", "custom-stats",
    }  # fmt: skip
    asked = {str(i): [questions.Question(1, "", "x", ())] for i in range(1065)}
    of_questions = {
        questions.dpg(asked, {k: [{1: "yes"}] * 4 for k in asked}, judge="")["protocol"],
        questions.soft_tifa(
            [{"prompt": "", "atom_count": 1, "skills": ["x"]}] * 800, [[1]] * 800, judge=""
        )["protocol"],
        questions.vbench({d: high for d, (_, high, _) in questions.VBENCH.items()})["protocol"],
    }
    assert wanted == {*protocols.FOLDERS, *of_questions, "geneval"} - {"coco2014-10k-sdxl-patch"}


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_named_protocol_is_applied_and_recorded(stubs, capsys):
    made = images(24)
    put("a", made)
    stats("cifar10-32x32.npz")
    result = run(capsys, "a", *EDM, "--reference", "cifar10-32x32.npz")
    (record,) = result["records"]
    digest = weights.digest("cifar10-32x32.npz")[:12]
    want = {
        "metric": "fd", "protocol": "edm-cifar10", "feature_net": stubs[0].name, "n": 24, "m": 0,
        "resize": "stub-2", "reference": digest, "seeds": "not known", "device": "cpu",
        "labels": f"expected: {protocols.FOLDERS['edm-cifar10'].labels}", "steps": None,
        "nfe": None, "guidance": None,
    }  # fmt: skip
    assert {"numpy", "Pillow", "clean-fid"} <= record["versions"].keys()
    assert "24 samples in 5 dimensions" in result["notes"][0]
    assert {key: record[key] for key in want} == want
    assert torch.equal(torch.stack(stubs[0].seen), made)
    real = statistics.load("cifar10-32x32.npz")
    moments = fid.mean_and_cov(Stub("weights.pt").features(made))
    assert record["value"] == pytest.approx(
        fid.frechet_distance(real.mu, real.sigma, *moments), rel=1e-9
    )


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_what_moves_a_number_makes_it_incomparable(stubs, capsys):
    put("a", images(24))
    put("b", images(24, seed=3))
    Path("other.pt").write_bytes(b"other weights")
    stats("one.npz")
    stats("two.npz", seed=2)
    base = run(capsys, "a", *EDM, "--reference", "one.npz")["records"][0]
    same = run(capsys, "b", *EDM, "--reference", "one.npz")["records"][0]
    assert comparable(base, same) and base["value"] != same["value"]
    other_net = ("--protocol", "edm-cifar10", "--weights", "inception-torchscript=other.pt")
    custom = ("--protocol", "custom-folder", "--network", TF1, *GIVEN)
    for argv in (
        (*EDM, "--reference", "two.npz"), (*EDM, "--reference", "one.npz", "--num", "20"),
        (*other_net, "--reference", "one.npz"), (*custom, "--reference", "one.npz"),
    ):  # fmt: skip
        assert not comparable(base, run(capsys, "a", *argv)["records"][0])


@pytest.mark.filterwarnings("ignore:a Frechet distance")
@pytest.mark.parametrize(
    ("protocol", "resize", "view"),
    [
        ("coco2014-30k", "lanczos-256+stub-2", lambda x: pixels.lanczos(x, 256)),
        ("coco2014-10k-sdxl-patch", "patch-299+stub-2", lambda x: x[..., 10:309, 50:349]),
        ("mjhq30k-sana", "short-side-512+stub-2", lambda x: pixels.short_side(x, 512)),
    ],
)
def test_the_view_of_a_protocol_comes_before_the_network(stubs, capsys, protocol, resize, view):
    made = images(24, (320, 400))
    put("a", made)
    source = "inception-pytorch" if protocol == "mjhq30k-sana" else "inception-torchscript"
    argv = ("--protocol", protocol, "--weights", f"{source}=weights.pt")
    result = run(capsys, "a", *argv, "--reference", stats("r.npz"))
    assert result["records"][0]["resize"] == resize
    assert torch.equal(torch.stack(stubs[0].seen), view(made))


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_wrong_without_the_view_the_number_is_another(stubs, capsys):
    made = (images(24, (320, 400)) * torch.linspace(0, 1, 400)).byte()  # crops are seen
    put("a", made)
    stats("r.npz")
    (record,) = run(capsys, "a", "--protocol", "coco2014-30k", *GIVEN, "--reference", "r.npz")[
        "records"
    ]
    real, net = statistics.load("r.npz"), Stub("weights.pt")

    def distance(shown):
        return fid.frechet_distance(real.mu, real.sigma, *fid.mean_and_cov(net.features(shown)))

    assert record["value"] == pytest.approx(distance(pixels.lanczos(made, 256)), rel=1e-9)
    assert abs(record["value"] / distance(made) - 1) > 1e-3


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_larger_folder_gives_edms_subset_and_a_smaller_one_is_refused(stubs, capsys):
    made = images(40)
    put("a", made)
    run(capsys, "a", *EDM, "--reference", stats("r.npz"))
    order = np.arange(40)
    np.random.RandomState(0).shuffle(order)
    assert torch.equal(torch.stack(stubs[0].seen), made[np.sort(order[:24])])
    put("few", made[:23])
    said = refused(capsys, "few", *EDM, "--reference", "r.npz")
    assert "few has 23 images. edm-cifar10 takes 24" in said and "--num" in said


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_wrong_parts_of_a_fixed_set_are_refused(stubs, capsys):
    put("a", images(40))
    coco = ("--protocol", "coco2014-30k", *GIVEN)
    stats("r.npz")
    assert "takes 24, of a fixed set" in refused(capsys, "a", *coco, "--reference", "r.npz")
    argv = (*coco, "--reference", "r.npz", "--num", "30")
    assert "takes 30, of a fixed set" in refused(capsys, "a", *argv)
    put("b", images(30))
    assert run(capsys, "b", *argv)["protocol"] == "coco2014-30k/n=30"
    put("real", images(101), ending="jpg")
    assert "takes 100, of a fixed" in refused(capsys, "real", *coco, "--write-reference", "x.npz")
    assert "is lossy" in refused(capsys, "real", *EDM, "--write-reference", "x.npz")
    assert not Path("x.npz").exists()


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_few_images_get_the_kernel_distance_too(stubs, capsys):
    put("a", images(30))
    stats("r.npz", feats=np.random.default_rng(0).normal(size=(60, 5)))
    argv = ("a", "--protocol", "custom-stats", "--network", TF1, *GIVEN, "--reference", "r.npz")
    assert [r["metric"] for r in run(capsys, *argv)["records"]] == ["fd", "kd"]
    only = run(capsys, *argv, "--metrics", "fid")
    assert [r["metric"] for r in only["records"]] == ["fd"]


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_sorted_reference_is_taken_in_random_order(stubs, capsys):
    put("a", made := images(24))
    feats = np.concatenate(
        [Stub("weights.pt").features(images(40, seed=1)), np.full((40, 5), 99.0)]
    )
    stats("r.npz", feats=feats)
    argv = ("--protocol", "custom-stats", "--network", TF1, *GIVEN, "--metrics", "prdc")
    rows = run(capsys, "a", *argv, "--reference", "r.npz")["records"]
    got = {r["metric"]: r["value"] for r in rows}
    mixed = feats[np.random.default_rng(0).permutation(80)][:24]
    f = Stub("weights.pt").features(made)
    assert got == prdc.prdc(mixed, f)
    assert got["coverage"] != prdc.prdc(feats[:24], f)["coverage"]


def test_a_reference_for_cmmd_keeps_more_features(stubs, capsys, monkeypatch):
    monkeypatch.setitem(
        networks.NETWORKS, folder.CMMD, ("clip-vitl14-336", lambda path, device: Stub(path))
    )
    monkeypatch.setattr(folder, "KEPT", 10)
    monkeypatch.setattr(folder, "KEPT_CMMD", 25)
    put("real", images(30))
    kept = {}
    for name, file in ((TF1, "inception-torchscript"), (folder.CMMD, "clip-vitl14-336")):
        argv = ("--protocol", "custom-folder", "--network", name, "--weights", f"{file}=weights.pt")
        run(capsys, "real", *argv, "--write-reference", "ref.npz")
        with np.load("ref.npz") as stored:
            kept[name] = len(stored["feats"])
    assert kept == {TF1: 10, folder.CMMD: 25}


def test_the_benchmark_of_hps_has_a_table_of_styles(stubs, monkeypatch, capsys):
    class Judge:
        name = "judge:0"

        def score(self, images, prompts):
            return np.array([float(p) for p in prompts])

    monkeypatch.setattr(preference, "scorer", lambda *args, **how: Judge())
    rules = protocols.FOLDERS["hpsv2-3200"]
    monkeypatch.setitem(protocols.FOLDERS, "hpsv2-3200", replace(rules, n=20))
    put("a", images(20))  # two folders of ten
    for i, file in enumerate(sorted(Path("a").rglob("*.png"))):
        file.with_suffix(".txt").write_text(str(i))
    result = run(capsys, "a", "--protocol", "hpsv2-3200", "--weights", "hpsv2.1=weights.pt")
    assert result["records"][0]["protocol"] == "hpsv2-3200"
    table = result["hpsv2.1_table"]
    assert table["mean"] == 9.5 and {k: v["mean"] for k, v in table["styles"].items()} == {
        "00": 4.5, "01": 14.5,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_adm_measures_all_of_its_numbers_from_one_pass(stubs, capsys, monkeypatch):
    rules = replace(protocols.FOLDERS["adm-imagenet256"], side=0)
    monkeypatch.setitem(protocols.FOLDERS, "adm-imagenet256", rules)
    real = images(30, seed=5)
    arrays = {"mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    stats("ref.npz", arr_0=real.permute(0, 2, 3, 1).numpy(), **arrays)
    put("a", made := images(24))
    argv = ("--protocol", "adm-imagenet256", "--weights", "inception-pytorch=weights.pt")
    result = run(capsys, "a", *argv, "--reference", "ref.npz")
    rows = {r["metric"]: r for r in result["records"]}
    assert {k: r["m"] for k, r in rows.items()} == {
        "is": 0, "fd": 0, "sfid": 0, "precision_adm": 30, "recall_adm": 30, "kd": 30,
    }  # fmt: skip
    assert len(stubs[0].seen) == 30 + 24 and not rows["is"]["reference"]
    a, b = (Taps("weights.pt").features(x) for x in (real, made))
    assert rows["recall_adm"]["value"] == prdc.prdc(a, b, k=3, strict=False)["recall"]
    stats("bare.npz")
    assert "no mu_s" in refused(capsys, "a", *argv, "--reference", "bare.npz", "--metrics", "sfid")


# ---- what is missing or wrong -----------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "needs a protocol. Give one of: edm-cifar10"),
        (("--protocol", "edm-cifar"), "Did you mean 'edm-cifar10'"),
        (EDM, "reference of edm-cifar10 is missing: EDM's cifar10-32x32.npz"),
        (("--protocol", "edm-cifar10", "--reference", "r.npz"), "91 MiB"),
        ((*EDM, "--reference", "no.npz"), "no.npz do not exist"),
        ((*EDM, "--reference", "of50.npz"), "of50.npz is of 50 images"),
        ((*EDM, "--reference", "wide.npz"), "has 9 features"),
        ((*EDM, "--reference", "r.npz", "--metrics", "kid"), "r.npz has no features"),
        ((*EDM, "--metrics", "is"), "inception-legacy_tensorflow gives no logits"),
        ((*EDM, "--reference", "r.npz", "--metrics", "geneval"), "cannot be had from a folder"),
        ((*EDM, "--reference", "r.npz", "--metrics", "vendi"), "--reference is for none of"),
        ((*EDM, "--reference", "r.npz", "--network", "inception-clean"), "looks through incepti"),
        ((*EDM, "--reference", "r.npz", "--num", "1"), "Give 2 or more"),
        ((*EDM, "--weights", "inception-pytorch=weights.pt"), "unknown weights 'inception-pyt"),
        (("--protocol", "edm-cifar10", "--weights", "weights.pt"), "Give NAME=PATH"),
        (("--protocol", "custom-folder", "--reference", "r.npz"), "--network with one of"),
        ((*EDM, "--detector", "shapes"), "--detector is for protocol geneval"),
        ((*EDM, "--reference", "r.npz", "--metrics", "hpsv2.1"), "--reference is for none of"),
        ((*EDM, "--metrics", "pickscore"), "reads prompts"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(stubs, capsys, argv, words):
    put("a", images(24))
    stats("r.npz")
    stats("of50.npz", n=50)
    stats("wide.npz", d=9)
    assert words in refused(capsys, "a", *argv)


def test_missing_weights_say_where_from_and_how_to_get_them(stubs, capsys):
    put("a", images(24))
    stats("r.npz")
    said = refused(capsys, "a", "--protocol", "edm-cifar10", "--reference", "r.npz")
    source = weights.SOURCES["inception-torchscript"]
    for word in (*source.files, source.address, source.size, "--allow-download"):
        assert word in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: Image.open(f).save(f.with_suffix(".jpg")), "is lossy"),
        (lambda f: Image.open(f).save(f.with_suffix(".bmp")), "is not read"),
        (lambda f: Image.new("RGB", (32, 33)).save(f), "has 32 x 33 pixels"),
        (lambda f: Image.open(f).convert("RGBA").save(f), "has the mode RGBA"),
        (lambda f: f.write_bytes(b"no image"), "cannot read image"),
    ],
)
def test_images_that_do_not_fit_are_named(stubs, capsys, change, words):
    put("a", images(24))
    change(Path("a/00/00003.png"))
    said = refused(capsys, "a", *EDM, "--reference", stats("r.npz"))
    assert words in said and "00003" in said


def test_a_pipeline_takes_no_flags_of_folders(stubs, capsys):
    assert "--reference is for a folder" in refused(capsys, "shapes-sd", "--reference", "r.npz")
    with pytest.raises(ValueError, match="edm-cifar10 judges a folder of images, not a pipeline"):
        protocols.get("edm-cifar10")


# ---- one's own data ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_reference_of_ones_own_has_all_that_metrics_need(stubs, capsys):
    custom = ("--protocol", "custom-folder", "--network", TF1, *GIVEN)
    real, fake = images(60, seed=1), images(30, seed=2)
    put("real", real, ending="jpg")
    put("real", images(1), start=99)
    put("fake", fake)
    assert run(capsys, "real", *custom, "--write-reference", "ref.npz") == "ref.npz"
    a, b = np.stack(stubs[0].features(torch.stack(stubs[0].seen[:61]))), stubs[0].features(fake)
    mine = statistics.load("ref.npz")
    assert mine.n == 61
    np.testing.assert_allclose(mine.mu, a.mean(0), rtol=1e-12)
    argv = (*custom, "--reference", "ref.npz", "--metrics", "fid,kid,prdc,vendi")
    assert command("fake", *argv, "--out", "o") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "o/fake.json" and not Path("evaluations").exists()
    assert [line.split()[0] for line in said[:2]] == ["fd", "kd"] and "(n=30, cust" in said[0]
    rows = {r["metric"]: r for r in json.loads(Path("o/fake.json").read_text())["records"]}
    assert rows["fd"]["value"] == pytest.approx(fid.frechet_distance_of_features(a, b), rel=1e-9)
    assert rows["kd"]["value"] == pytest.approx(kid.kernel_distance(a, b)[0], rel=1e-3)
    assert {k: rows[k]["m"] for k in ("fd", "kd", "recall", "vendi")} == {
        "fd": 61, "kd": 61, "recall": 30, "vendi": 0,
    }  # fmt: skip
    assert len(rows) == 7 and rows["fd"]["protocol"] == "custom-folder"
    clean = ("--protocol", "custom-folder", "--network", "inception-clean")
    Path("other.pt").write_bytes(b"other")
    said = refused(capsys, "fake", *clean, "--weights", "inception-torchscript=other.pt",
                   "--reference", "ref.npz")  # fmt: skip
    assert "ref.npz was made with stub" in said


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_images_of_several_sizes_keep_their_order(stubs):
    small, wide = images(12), images(12, (40, 64), seed=1)
    for k in range(12):
        put("a", small[k : k + 1], start=2 * k)
        put("a", wide[k : k + 1], start=2 * k + 1)
        for i in (2 * k, 2 * k + 1):
            Path(f"a/{i // 10:02}/{i:05}.txt").write_text(f"prompt {k}")
    source = folder.Weights({"inception-torchscript": "weights.pt"})
    result = folder.evaluate_folder(
        "a", "custom-folder", network=TF1, metrics=["diversity"], source=source
    )
    net = Stub("weights.pt")
    f, g = net.features(small), net.features(wide)
    cosine = (f * g).sum(1) / np.linalg.norm(f, axis=1) / np.linalg.norm(g, axis=1)
    assert result["records"][0]["value"] == pytest.approx(1 - cosine.mean(), rel=1e-9)


def test_scores_of_single_images_see_the_whole_image_and_its_prompt(stubs, monkeypatch, capsys):
    class Judge:
        name = "judge:0"

        def score(self, images, prompts):
            assert images.shape[1:] == (3, 320, 400)
            return np.array([float(p.split()[1]) for p in prompts])

    given = []
    monkeypatch.setattr(
        preference, "scorer", lambda name, paths, **how: given.append((name, paths, how)) or Judge()
    )
    put("a", images(24, (320, 400)))
    for i, file in enumerate(sorted(Path("a").rglob("*.png"))):
        file.with_suffix(".txt").write_text(f"cat {i}")
    argv = ("--protocol", "coco2014-30k", "--metrics", "pickscore", "--weights", "pickscore=p")
    (record,) = run(capsys, "a", *argv)["records"]
    assert record["value"] == 11.5 and record["feature_net"] == "judge:0"
    assert (record["m"], record["reference"], record["resize"]) == (0, "", "its own")
    assert given == [("pickscore", ["p", None], {"device": torch.device("cpu"),
                                                 "allow_download": False})]  # fmt: skip
    assert stubs == []  # no feature network is opened


def test_wrong_results_are_never_overwritten(stubs, capsys):
    for name in ("one", "two"):
        put(f"{name}/x", images(24))
    custom = ("--protocol", "custom-folder", "--network", TF1, *GIVEN, "--metrics", "vendi")
    assert command("one/x", *custom, "--out", "o") == command("one/x", *custom, "--out", "o") == 0
    before = Path("o/x.json").read_text()
    capsys.readouterr()
    seen = len(stubs[-1].seen)
    said = refused(capsys, "two/x", *custom, "--out", "o")
    assert "o/x.json holds the numbers of another folder: 'one/x', not 'two/x'" in said
    said = refused(capsys, "one/x", *custom, "--out", "o", "--num", "20")
    assert "x.json holds the numbers of another n: 24, not 20" in said
    assert Path("o/x.json").read_text() == before and len(stubs[-1].seen) <= seen


# ---- folders that `sample` draws --------------------------------------------------------


class Drawer:
    """A pipeline whose image i is a function of prompt and seed."""

    pipe = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)

    def __init__(self, channels=3):
        self.info, self.channels, self.asked = (
            {"name": "s", "guidance": 0, "steps": 2},
            channels,
            [],
        )

    def nfe(self, steps=None):
        return 2 * (steps or 2)

    def sample(self, conditions, seeds, *, steps=None):
        self.asked += list(zip(conditions, seeds, strict=True))
        return torch.tensor(seeds).byte().view(-1, 1, 1, 1).expand(-1, self.channels, 32, 32)


def test_a_drawn_folder_continues_and_says_what_it_is(stubs, capsys):
    few = Drawer()
    assert folder.draw("d", few, ["a", "b", "a"], first=5) == 3
    drawer = Drawer()
    assert folder.draw("d", drawer, ["a", "b", "a", "b"], first=5) == 1
    assert few.asked == [("a", 5), ("b", 6), ("a", 7)] and drawer.asked == [("b", 8)]
    assert sorted(p.name for p in Path("d").iterdir()) == sorted(
        ["source.json", *(f"0000{i}.{end}" for i in (5, 6, 7, 8) for end in ("png", "txt"))]
    )
    assert Path("d/00006.txt").read_text() == "b\n"
    assert np.unique(np.array(Image.open("d/00008.png"))).tolist() == [8]
    custom = ("--protocol", "custom-folder", "--network", TF1, *GIVEN, "--metrics", "vendi")
    (record,) = run(capsys, "d", *custom)["records"]
    assert (record["steps"], record["nfe"], record["guidance"]) == (2, 4, 0)
    assert (record["seeds"], record["labels"]) == ("the files' names", "prompts of NAME.txt")
    with pytest.raises(ValueError, match="belongs to images of another source"):
        folder.draw("d", Drawer(), ["a"], first=5, steps=1)
    with pytest.raises(ValueError, match=r"00005.txt belongs to another prompt"):
        folder.draw("d", Drawer(), ["z"], first=5)
    grey = Drawer(channels=1)
    folder.draw("g", grey, [3, 4], first=0)
    assert json.loads(Path("g/source.json").read_text())["labels"] == "classes as asked"
    assert Image.open("g/00001.png").mode == "RGB" and not list(Path("g").glob("*.txt"))


# ---- GenEval ----------------------------------------------------------------------------


def test_a_folder_of_geneval_with_a_detector(stubs, capsys):
    scenes = [shapes.scene(i, "test") for i in range(12)]

    def draw(prompts, seeds):
        return shapes.render([scenes[seed] for seed in seeds])

    made = {"pipeline": "world", "steps": 4, "nfe": 8, "guidance": 2.0, "seeds": "i"}
    geneval_folder.write("g", draw, source=made, count=1,
                         records=[s.record for s in scenes])  # fmt: skip
    result = run(capsys, "g", "--detector", "shapes")
    (record,) = result["records"]
    assert record["value"] == 1 and record["metric"] == "geneval"
    assert (record["protocol"], record["n"], record["m"]) == ("geneval/n=12", 12, 0)
    assert record["feature_net"].startswith("geneval/shapes/")
    told = ("steps", "nfe", "guidance", "seeds")
    assert {k: record[k] for k in told} == {k: made[k] for k in told}
    assert len(result["verdicts"]) == 12 and result["any_correct"] == 1
    said = refused(capsys, "g", "--protocol", "geneval")
    assert "m2f-swin-s are missing" in said and "--allow-download" in said
    assert "--num has no meaning" in refused(capsys, "g", "--detector", "shapes", "--num", "9")
