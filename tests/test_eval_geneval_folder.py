"""GenEval's prompts, colours, and folders of images from writing to verdicts."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data import shapes
from diffdistill.eval import colours, detectors, geneval_folder, geneval_prompts
from diffdistill.eval.geneval import Detection, verdict

# Prompts


def test_20_the_generator_repeats_the_published_file():
    data = geneval_prompts.text().encode()
    assert len(data) == 85_209
    assert hashlib.sha256(data).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    )


def test_the_prompts_are_553_of_six_tasks_in_order():
    records = geneval_prompts.records()
    tags = [r["tag"] for r in records]
    assert Counter(tags) == dict(zip(shapes.TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    assert tags == sorted(tags, key=shapes.TASKS.index)
    assert {r["include"][0]["class"] for r in records[:80]} == set(geneval_prompts.CLASSES)
    counting = [r for r in records if r["tag"] == "counting"]
    assert Counter(r["include"][0]["count"] for r in counting) == {2: 26, 3: 28, 4: 26}
    assert all(r["exclude"][0]["count"] == r["include"][0]["count"] + 1 for r in counting)
    relations = Counter(r["include"][1]["position"][0] for r in records if r["tag"] == "position")
    assert relations == {"below": 28, "right of": 27, "above": 26, "left of": 19}
    coloured = [c for r in records for c in r["include"] if "color" in c]
    assert all(c["class"] != "person" and c["color"] in geneval_prompts.COLOURS for c in coloured)


def test_wrong_draws_are_an_error(monkeypatch):
    monkeypatch.setattr(geneval_prompts, "SEED", 42)
    with pytest.raises(RuntimeError, match="other GenEval prompts"):
        geneval_prompts.text.__wrapped__()


# Colours


def red_on_green():
    """A red disc with its mask on green; its box also holds green corners."""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    mask = (x - 25) ** 2 + (y - 20) ** 2 <= 100
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    image[1], image[0, mask], image[1, mask] = 255, 255, 0
    return image, Detection("cup", 0.9, (15, 10, 36, 31), mask=mask)


def pixels(image):
    return Counter(map(tuple, np.array(image).reshape(-1, 3).tolist()))


def test_15_the_crop_has_no_green_pixel_and_a_grey_background():
    image, cup = red_on_green()
    seen = pixels(colours.crop(image, cup))
    assert set(seen) == {(255, 0, 0), (153, 153, 153)}
    assert seen[255, 0, 0] == int(cup.mask.sum()) and sum(seen.values()) == 21 * 21


def test_15_wrong_without_the_mask_there_is_green():
    image, _ = red_on_green()
    plain = Detection("cup", 0.9, (14.6, 9.7, 36.2, 31.4))
    assert colours.crop(image, plain).size == (21, 21)
    assert (0, 255, 0) in pixels(colours.crop(image, plain))


def test_crops_stay_inside_the_image_and_are_never_empty():
    image, _ = red_on_green()
    for box in ((-3.0, -2.0, 60.0, 45.0), (20.2, 20.2, 20.3, 20.3), (49.9, 39.9, 50.0, 40.0)):
        w, h = colours.crop(image, Detection("cup", 0.5, box)).size
        assert 1 <= w <= 50 and 1 <= h <= 40


class StubClip:
    """Images are their mean colour. Templates of one colour have embeddings of unequal length."""

    name = "stub:00000000"

    def __init__(self):
        self.asked = []

    def embed(self, pictures):
        one = (p.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for p in pictures)
        return np.array(list(one), np.float64)

    def text(self, prompts):
        self.asked += prompts
        rgb = {"red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1)}
        rows = []
        for prompt in prompts:
            colour = next((c for c in rgb if c in prompt), None)
            row = np.array(rgb.get(colour, (0.1, 0.1, 1.0)))
            if prompt == "a photo of a green object":  # counts one third, however long it is
                row = np.array((100.0, 0.0, 0.0))
            rows.append(row)
        return np.stack(rows)


def test_a_colour_is_the_mean_of_three_normalised_templates_of_the_class():
    image, cup = red_on_green()
    green = torch.zeros_like(image)
    green[1] = 200
    clip = StubClip()
    classifier = colours.ColourClassifier(clip)
    assert classifier.classify(image, [cup, cup]) == ["red", "red"]
    assert clip.asked[:3] == [
        "a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object",
    ]  # fmt: skip
    assert len(clip.asked) == 3 * 10
    assert classifier.classify(green, [Detection("cup", 0.9, (0, 0, 9, 9))]) == ["green"]
    assert len(clip.asked) == 3 * 10  # texts of a class are made once
    assert classifier.classify(image, []) == []
    wrong = clip.text([f"a photo of a green{t}" for t in (" cup", "-colored cup", " object")])
    assert wrong.mean(0)[0] > 10 * wrong.mean(0)[1]  # not normalised: green would look red


def test_open_clip_from_a_file(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    for name, width in (("tiny-quickgelu", 16), ("other", 32)):
        vision = {"image_size": 32, "layers": 1, "width": width, "patch_size": 8, "head_width": 8}
        text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    net, _, preprocess = open_clip.create_model_and_transforms("tiny-quickgelu")
    net.eval()
    save_file(net.state_dict(), tmp_path / "tiny.safetensors")
    half = {k: v.half() for k, v in net.state_dict().items()}
    torch.save({**half, "context_length": torch.tensor(77)}, tmp_path / "openai.pt")
    image, cup = red_on_green()
    found = [cup, Detection("cup", 0.8, (0, 0, 20, 40))]
    classifier = colours.load(tmp_path / "tiny.safetensors", model="tiny-quickgelu")
    tokenizer = open_clip.get_tokenizer("tiny-quickgelu")
    with torch.no_grad():
        seen = net.encode_image(torch.stack([preprocess(colours.crop(image, d)) for d in found]))
        scores = []
        for colour in geneval_prompts.COLOURS:
            texts = [f"a photo of a {colour} cup", f"a photo of a {colour}-colored cup"]
            texts = net.encode_text(tokenizer([*texts, f"a photo of a {colour} object"]))
            mean = (texts / texts.norm(dim=1, keepdim=True)).sum(0)
            scores.append(seen @ mean / mean.norm())
    best = torch.stack(scores).argmax(0)
    assert classifier.classify(image, found) == [geneval_prompts.COLOURS[k] for k in best]
    assert classifier.name.startswith("tiny-quickgelu:")
    old = colours.load(tmp_path / "openai.pt", model="tiny-quickgelu")
    red = ["a photo of a red cup"]
    np.testing.assert_allclose(old.clip.text(red), classifier.clip.text(red), 0.02, 0.02)
    assert old.name != classifier.name
    with pytest.raises(ValueError, match="does not fit"):
        colours.load(tmp_path / "tiny.safetensors", model="other")


def test_openais_weights_get_quick_gelu_and_are_not_fetched_silently(monkeypatch, tmp_path):
    import open_clip

    assert open_clip.get_model_config(colours.MODEL)["quick_gelu"] is True
    assert not open_clip.get_model_config("ViT-L-14").get("quick_gelu")  # the trap
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"ViT-L-14\.pt"):
        colours.load()


# Verdicts with a classifier


def test_only_the_objects_that_are_asked_for_are_classified():
    record = {
        "tag": "colors",
        "prompt": "a photo of a red cup",
        "include": [{"class": "cup", "count": 1, "color": "red"}],
    }
    found = [Detection("cup", s, (0, 0, 9, 9)) for s in (0.4, 0.9, 0.5)]
    asked = []

    def classify(objects):
        asked.extend(objects)
        return ["red" for _ in objects]

    assert verdict(record, found, classify=classify).correct
    assert [d.score for d in asked] == [0.9]
    assert verdict(record, found).reason == "cup: red asked, found no known colour"


def test_a_position_that_fails_is_no_target_either():
    where = {"class": "cup", "count": 1}
    record = {
        "tag": "position", "prompt": "",
        "include": [
            where,
            {"class": "dog", "count": 1, "position": ["left of", 0]},
            {"class": "cat", "count": 1, "position": ["right of", 1]},
        ],
    }  # fmt: skip
    found = [Detection(c, 0.9, (x, 0, x + 9, 9)) for c, x in (("cup", 0), ("dog", 50), ("cat", 90))]
    reasons = verdict(record, found).reason.split("; ")
    assert reasons == ["dog: left of cup asked, is right of it", "cat: nothing to be right of"]


# Folders


RECORDS = [shapes.scene(i, "test").record for i in range(12)]


def pictures(prompts, seeds):
    """Image k of prompt i is right, but all of prompt 0 and the second of the others are empty."""
    scenes = [shapes.scene(s // 4, "test") for s in seeds]
    assert [s.caption for s in scenes] == list(prompts)
    images = shapes.render(scenes)
    for image, seed in zip(images, seeds, strict=True):
        if seed < 4 or seed % 4 == 1:
            image.fill_(140)
        image[0, 0, 0] = seed
    return images


SOURCE = {"pipeline": "drawn", "steps": 1}


def test_a_folder_is_written_once_and_judged(tmp_path):
    drawn = geneval_folder.write(tmp_path, pictures, source=SOURCE, records=RECORDS, batch=7)
    assert drawn == 48
    first = tmp_path / "00003"
    assert json.loads((first / "metadata.jsonl").read_text()) == RECORDS[3]
    names = [f"{k:05}.png" for k in range(4)]
    assert sorted(f.name for f in (first / "samples").iterdir()) == names
    seeds = [Image.open(first / "samples" / n).getpixel((0, 0))[0] for n in names]
    assert seeds == [12, 13, 14, 15]

    lost = first / "samples" / "00002.png"
    before = lost.read_bytes()
    lost.unlink()
    assert geneval_folder.write(tmp_path, pictures, source=SOURCE, records=RECORDS, batch=1) == 1
    assert lost.read_bytes() == before

    (first / "grid.png").write_bytes(b"another tool's")
    results = geneval_folder.geneval_folder(tmp_path, detectors.load("shapes"))
    source = Path(detectors.shapes_detector.__file__).read_bytes()
    digest = hashlib.sha256(source).hexdigest()[:8]
    assert results["key"] == results["feature_net"] == f"geneval/shapes/{digest}"
    assert (results["protocol"], results["n"], results["prompts"]) == ("geneval/n=48", 48, 12)
    assert results["tasks"]["single_object"] == pytest.approx(3 / 8)  # prompts 0 and 6
    assert {v for k, v in results["tasks"].items() if k != "single_object"} == {3 / 4}
    assert results["overall"] == pytest.approx((5 * 0.75 + 0.375) / 6)
    assert results["correct_images"] == pytest.approx(33 / 48)
    assert results["any_correct"] == pytest.approx(11 / 12)
    row = results["verdicts"][13]
    assert row["file"] == "00003/samples/00001.png" and row["index"] == 3 and not row["correct"]
    assert row["prompt"] == RECORDS[3]["prompt"] and "0 found, 1 asked" in row["reason"]
    assert all(bool(v["reason"]) is not v["correct"] for v in results["verdicts"])


def test_a_folder_of_other_images_is_refused(tmp_path):
    geneval_folder.write(tmp_path, pictures, source=SOURCE, records=RECORDS[:2])
    with pytest.raises(ValueError, match="images of another source"):
        geneval_folder.write(tmp_path, pictures, source={"steps": 2}, records=RECORDS[:2])
    with pytest.raises(ValueError, match="images of another source"):  # other seeds
        geneval_folder.write(tmp_path, pictures, source=SOURCE, records=RECORDS[:2], count=2)
    with pytest.raises(ValueError, match="another prompt"):
        geneval_folder.write(tmp_path, pictures, source=SOURCE, records=RECORDS[1:3])
    with pytest.raises(ValueError, match="0 images of each"):
        geneval_folder.write(tmp_path, pictures, source=SOURCE, records=RECORDS, count=0)


class StubDetector:
    """Finds what it is told to, everywhere."""

    name, digest, classes, colours = "stub", "0" * 8, geneval_prompts.CLASSES, ()
    threshold, counting_threshold = 0.3, 0.9

    def __init__(self, *found):
        self.found, self.seen = list(found), []

    def detect(self, images, classes=None):
        self.seen.append((tuple(images.shape), classes))
        return [self.found for _ in images]


def begin(folder, record, image=None):
    (folder / "00000" / "samples").mkdir(parents=True)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps(record))
    if image is not None:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.save(folder / "00000" / "samples" / "0000.png")


RED_CUP = {
    "tag": "colors", "prompt": "a photo of a red cup",
    "include": [{"class": "cup", "count": 1, "color": "red"}],
}  # fmt: skip


def test_colours_come_from_the_classifier(tmp_path):
    image, cup = red_on_green()
    begin(tmp_path, RED_CUP, image)
    classifier = colours.ColourClassifier(StubClip())
    results = geneval_folder.geneval_folder(tmp_path, StubDetector(cup), classifier)
    assert results["overall"] == 1 and results["verdicts"][0]["reason"] == ""
    assert results["feature_net"] == "geneval/stub/00000000+stub:00000000"
    lid = Detection("cup", 0.95, (0, 0, 9, 9))  # more confident, and green
    results = geneval_folder.geneval_folder(tmp_path, StubDetector(cup, lid), classifier)
    assert results["verdicts"][0]["reason"] == "cup: red asked, found green"
    with pytest.raises(ValueError, match=r"tell red; the detector stub alone knows: no colour"):
        geneval_folder.geneval_folder(tmp_path, StubDetector(cup))


def test_images_are_judged_upright_at_their_own_size(tmp_path):
    image, _ = red_on_green()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    begin(tmp_path, RED_CUP, image)
    samples = tmp_path / "00000" / "samples"
    Image.open(samples / "0000.png").save(samples / "1.png", exif=exif)
    detector = StubDetector()
    geneval_folder.geneval_folder(tmp_path, detector, colours.ColourClassifier(StubClip()))
    assert detector.seen == [((1, 3, 40, 50), ["cup"]), ((1, 3, 50, 40), ["cup"])]


def test_wrong_folders_say_what_to_do(tmp_path):
    detector = StubDetector()
    with pytest.raises(ValueError, match="no folder of GenEval"):
        geneval_folder.geneval_folder(tmp_path, detector)
    begin(tmp_path, RED_CUP)
    with pytest.raises(ValueError, match="no samples"):
        geneval_folder.geneval_folder(tmp_path, detector)
    broken = tmp_path / "00000" / "samples" / "00000.png"
    broken.write_bytes(b"no picture")
    known = colours.ColourClassifier(StubClip())
    with pytest.raises(ValueError, match="cannot read image"):
        geneval_folder.geneval_folder(tmp_path, detector, known)
    metadata = tmp_path / "00000" / "metadata.jsonl"
    metadata.write_text(json.dumps(RECORDS[0]))
    with pytest.raises(ValueError, match=f"does not know {RECORDS[0]['include'][0]['class']}"):
        geneval_folder.geneval_folder(tmp_path, detector)
    for text in ("{", '{"tag": "colors"}', '{"tag": "a", "prompt": "b", "include": [{}]}'):
        metadata.write_text(text)
        with pytest.raises(ValueError, match="no GenEval record"):
            geneval_folder.geneval_folder(tmp_path, detector)
    metadata.unlink()
    with pytest.raises(ValueError, match="is missing"):
        geneval_folder.geneval_folder(tmp_path, detector)


def test_the_calibration_line_needs_the_whole_benchmark(tmp_path):
    def sample(prompts, seeds):
        return torch.zeros(len(prompts), 3, 2, 2, dtype=torch.uint8)

    assert geneval_folder.write(tmp_path, sample, source=SOURCE, batch=500) == 2212
    person = Detection("person", 0.95, (0, 0, 2, 2))
    detector, known = StubDetector(person), colours.ColourClassifier(StubClip())
    results = geneval_folder.geneval_folder(tmp_path, detector, known)
    assert results["protocol"] == "geneval" and results["n"] == 2212
    assert results["tasks"]["single_object"] == 1 / 80 and results["tasks"]["color_attr"] == 0
    line = geneval_folder.calibration(results, "SD1.5")
    assert line == (
        "calibration: SD1.5 scores 0.002 with geneval/stub/00000000, 0.43 published with the "
        "reference detector"
    )
    assert "0.55 published" in geneval_folder.calibration(results, "SDXL")
    with pytest.raises(ValueError, match="Known: SD1"):
        geneval_folder.calibration(results, "SD3")
    part = results | {"protocol": "geneval/n=4", "prompts": 1}
    with pytest.raises(ValueError, match="553"):
        geneval_folder.calibration(part, "SDXL")
