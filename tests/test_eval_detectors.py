"""The detectors behind GenEval: raw outputs to boxes, and folders of weights to detectors."""

import dataclasses
import hashlib
import types

import pytest
import torch
from torch import nn

from diffdistill import assets
from diffdistill.data import shapes
from diffdistill.eval import detectors
from diffdistill.eval.geneval_prompts import CLASSES

CLOCK = CLASSES.index("clock")


def class_logits(*labels, sure=12.0):
    """[Q, 81]: query q is surely of class labels[q]; 80 is no object."""
    return sure * nn.functional.one_hot(torch.tensor(labels), 81).float()


class RightHalf(nn.Module):
    """Sees a clock exactly on the right half of the image without its padding."""

    def forward(self, pixel_values):
        _, _, h, w = pixel_values.shape
        assert (h, w) == (800, 1216)  # 256 x 384 becomes 800 x 1200, then a multiple of 32
        logits = torch.full((1, 1, h // 4, w // 4), -10.0)
        logits[..., 600 // 4 : 1200 // 4] = 10.0
        return types.SimpleNamespace(
            class_queries_logits=class_logits(CLOCK)[None], masks_queries_logits=logits
        )


IMAGE = torch.zeros(1, 3, 256, 384, dtype=torch.uint8)


def test_16_padding_is_cropped_before_the_mask_is_enlarged():
    found = detectors.Mask2Former(net=RightHalf()).detect(IMAGE)[0]
    best = found[0]
    assert best.cls == "clock" and best.score > 0.9
    assert best.box[0] == pytest.approx(384 / 2, abs=1)
    assert best.box[1:] == (0, 384, 256)
    assert best.mask.shape == (256, 384)
    assert best.mask[:, 200:].all() and not best.mask[:, :180].any()


def test_16_wrong_without_the_crop():
    out = RightHalf()(torch.zeros(1, 3, 800, 1216))
    found = detectors.instances(
        out.class_queries_logits[0], out.masks_queries_logits[0],
        padded=(800, 1216), inner=(800, 1216), size=(256, 384),
    )  # fmt: skip
    assert abs(found[0].box[0] - 384 / 2) > 1


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((256, 384), (800, 1200), (800, 1216)),
        ((512, 512), (800, 800), (800, 800)),
        ((100, 1000), (133, 1333), (160, 1344)),
    ],
)
def test_mask2former_sees_800_to_1333_pixels_and_zeros_beside(size, inner, padded):
    image = torch.full((3, *size), 255, dtype=torch.uint8)
    pixels, kept = detectors._resize_and_pad(image, (800, 1333))
    assert (kept, pixels.shape[1:]) == (inner, padded)
    white = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(pixels[:, : inner[0], : inner[1]].amin((1, 2)), white)
    outside = pixels.clone()
    outside[:, : inner[0], : inner[1]] = 0
    assert not outside.any()


def flat(class_logits, mask_logits):
    size = mask_logits.shape[-2:]
    return detectors.instances(class_logits, mask_logits, padded=size, inner=size, size=size)


def test_the_score_is_probability_times_mask_quality():
    logits = torch.zeros(1, 81)
    logits[0, 64], logits[0, 80] = 5.0, 5.0
    masks = torch.full((1, 8, 8), -5.0)
    masks[0, 2:4, 3:7] = 2.0
    best = flat(logits, masks)[0]
    p = logits[0].softmax(0)[64].item()
    assert best.score == pytest.approx(p / (1 + torch.tensor(-2.0).exp().item()), rel=1e-5)
    assert best.box == (3, 2, 7, 4) and int(best.mask.sum()) == 8
    assert best.cls == "computer mouse"  # by index; COCO says mouse
    wrong = logits[0, :80].softmax(0)[64].item()  # no-object removed before the softmax
    assert abs(best.score - wrong / (1 + torch.tensor(-2.0).exp().item())) > 0.01


def test_the_best_hundred_pairs_of_query_and_class_without_empty_masks():
    logits, masks = torch.randn(3, 81), torch.randn(3, 8, 8)
    masks[1] = -1.0
    found = flat(logits, masks)
    p = logits.softmax(-1)[:, :-1]
    kept = [pair for pair in p.flatten().topk(100).indices.tolist() if pair // 80 != 1]
    assert [d.cls for d in found] == [CLASSES[pair % 80] for pair in kept]
    assert 50 < len(found) < 100
    for pair, d in zip(kept, found, strict=True):
        assert torch.equal(d.mask, masks[pair // 80] > 0)


def test_three_names_differ_from_coco():
    assert [CLASSES[i] for i in (0, 63, 64, 65, 66, 67, 79)] == [
        "person", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
        "toothbrush",
    ]  # fmt: skip
    assert len(set(CLASSES)) == 80


def test_owlv2_boxes_lie_in_a_padded_square_and_overlaps_go():
    outputs = types.SimpleNamespace(
        logits=torch.full((1, 5, 80), -9.0),
        pred_boxes=torch.tensor(
            [[0.25, 0.25, 0.5, 0.5], [0.26, 0.25, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5],
             [0.5, 0.75, 1.0, 0.5], [0.1, 0.1, 0.1, 0.1]]
        )[None],
    )  # fmt: skip
    for box, (label, logit) in enumerate([(74, 2.0), (74, 1.0), (0, 0.0), (0, 0.5), (0, -5.0)]):
        outputs.logits[0, box, label] = logit

    def tokenizer(texts, **_):
        assert len(texts) == 80 and texts[74] == "a photo of a clock"
        return Encoded(input_ids=None, attention_mask=None)

    class Encoded(types.SimpleNamespace):
        def to(self, device):
            return self

    class Net:
        text_config = types.SimpleNamespace(max_position_embeddings=16)
        config = types.SimpleNamespace(text_config=text_config)

        def __call__(self, **_):
            return outputs

    processor = types.SimpleNamespace(
        tokenizer=tokenizer, image_processor=lambda *_, **__: Encoded(pixel_values=torch.zeros(1))
    )
    detector = detectors.Owlv2(net=Net(), processor=processor)
    found = detector.detect(torch.zeros(1, 3, 60, 100, dtype=torch.uint8))[0]
    assert [(d.cls, d.box) for d in found] == [
        ("clock", (0, 0, 50, 50)),
        ("person", (0, 50, 100, 60)),  # cut at the image's edge
        ("person", (0, 0, 50, 50)),  # another class than the clock there
    ]
    assert [d.score for d in found] == pytest.approx([0.880797, 0.622459, 0.5], abs=1e-5)
    both = dataclasses.replace(detector, overlap=1.0).detect(IMAGE)[0]
    assert [d.cls for d in both].count("clock") == 2


# Tiny networks with random weights, saved and loaded through the public path


def swin(*stages):
    from transformers import SwinConfig

    return SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=[f"stage{i}" for i in stages],
    )  # fmt: skip


def save_mask2former(folder, labels=80):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(
        backbone_config=swin(1, 2, 3, 4), num_labels=labels, num_queries=10, hidden_dim=32,
        mask_feature_size=32, feature_size=32, num_attention_heads=2, dim_feedforward=16,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def save_owlv2(folder):
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    small = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = Owlv2Config(
        text_config={**small, "max_position_embeddings": 16, "vocab_size": 600},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(assets.path("judges", "shapes-clip", "tokenizer"))
    image = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(image_processor=image, tokenizer=tokenizer).save_pretrained(folder)


def save_gdino(folder):
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "hot", "dog"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer.from_pretrained(folder)
    text = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin(2, 3, 4), text_config=text, num_queries=8, encoder_layers=1,
        decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, d_model=32, max_text_len=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    image = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(image_processor=image, tokenizer=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    save_mask2former(root / "m2f")
    save_owlv2(root / "owlv2")
    save_gdino(root / "gdino")
    return root


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(1)).byte()


def test_mask2former_from_a_folder_agrees_with_its_raw_outputs(folders, images):
    detector = detectors.load("m2f-swin-s", folders / "m2f")
    detector = dataclasses.replace(detector, sides=(64, 128))
    found = detector.detect(images)
    weights = (folders / "m2f" / "model.safetensors").read_bytes()
    assert detector.digest == hashlib.sha256(weights).hexdigest()[:8]
    assert detector.name == "m2f-swin-s"
    assert (detector.threshold, detector.counting_threshold) == (0.3, 0.9)
    pixels, inner = detectors._resize_and_pad(images[1], (64, 128))
    with torch.no_grad():
        out = detector.net(pixel_values=pixels[None])
    assert out.masks_queries_logits.shape[-1] * 4 == pixels.shape[-1] == 96
    p = out.class_queries_logits[0].softmax(-1)[:, :-1]
    wanted = []
    for pair in p.flatten().argsort(descending=True)[:100].tolist():
        q, k = divmod(pair, 80)
        m = out.masks_queries_logits[:1, q : q + 1]
        m = nn.functional.interpolate(m, pixels.shape[-2:], mode="bilinear")
        m = m[..., : inner[0], : inner[1]]
        m = nn.functional.interpolate(m, (40, 60), mode="bilinear")[0, 0]
        if (m > 0).any():
            quality = m[m > 0].sigmoid().sum() / ((m > 0).sum() + 1e-6)
            wanted.append((CLASSES[k], (p[q, k] * quality).item()))
    wanted.sort(key=lambda row: -row[1])
    assert [d.score for d in found[1]] == pytest.approx([s for _, s in wanted], rel=1e-4)
    assert found[1][0].cls == wanted[0][0] and len(wanted) > 10
    assert all(d.mask.shape == (40, 60) for d in found[1])


def test_owlv2_from_a_folder_agrees_with_the_library(folders, images):
    detector = detectors.load("owlv2", folders / "owlv2", threshold=0.0)
    assert detector.name == "owlv2@0,0.2"
    detector = dataclasses.replace(detector, overlap=1.0)
    found = detector.detect(images)[0]
    queries = detector.processor.tokenizer(
        [f"a photo of a {c}" for c in CLASSES], padding="max_length", max_length=16,
        truncation=True, return_tensors="pt",
    )  # fmt: skip
    pixels = detector.processor.image_processor(images[0], return_tensors="pt").pixel_values
    with torch.no_grad():
        out = detector.net(**queries, pixel_values=pixels)
    library = detector.processor.image_processor.post_process_object_detection(
        out, threshold=0.0, target_sizes=[(40, 60)]
    )[0]
    order = library["scores"].argsort(descending=True, stable=True)
    limit = torch.tensor([60, 40, 60, 40])
    assert len(found) == 16
    assert [d.score for d in found] == pytest.approx(library["scores"][order].tolist())
    assert {d.cls for d in found} == {CLASSES[k] for k in library["labels"]}
    clipped = torch.minimum(library["boxes"].clamp(min=0), limit)
    total = torch.tensor([d.box for d in found]).sum(0)
    torch.testing.assert_close(total, clipped.sum(0), rtol=1e-4, atol=1e-3)


def test_grounding_dino_is_asked_for_one_class_at_a_time(folders, images):
    detector = detectors.load("gdino", folders / "gdino", threshold=0.0, counting_threshold=0.0)
    asked = []
    hook = detector.net.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    found = detector.detect(images[:1], classes=["hot dog", "dog"])[0]
    hook.remove()
    assert asked == [[[2, 6, 7, 5, 3]], [[2, 7, 5, 3]]]  # [CLS] hot dog . [SEP]
    text = detector.processor.tokenizer("dog.", return_tensors="pt")
    pixels = detector.processor.image_processor(images[:1], return_tensors="pt")
    with torch.no_grad():
        out = detector.net(**pixels, **text)
    library = detector.processor.post_process_grounded_object_detection(
        out, text.input_ids, threshold=0.0, text_threshold=0.0, target_sizes=[(40, 60)]
    )[0]
    dogs = [d for d in found if d.cls == "dog"]
    assert len(dogs) == 8 and len(found) == 16
    wanted = sorted(library["scores"].tolist(), reverse=True)
    assert [d.score for d in dogs] == pytest.approx(wanted)
    clipped = torch.minimum(library["boxes"].clamp(min=0), torch.tensor([60, 40, 60, 40]))
    total = torch.tensor([d.box for d in dogs]).sum(0)
    torch.testing.assert_close(total, clipped.sum(0), rtol=1e-4, atol=1e-3)


def test_shapes_is_the_analytic_detector():
    detector = detectors.load("shapes")
    scene = shapes.scene(1, "test")
    found = detector.detect(shapes.render([scene]))[0]
    assert {(d.cls, d.colour) for d in found} == {(t.shape, t.colour) for t in scene.things}
    assert detector.name == "shapes" and len(detector.digest) == 8
    with pytest.raises(ValueError, match="has no weights"):
        detectors.load("shapes", "somewhere")


# What a user can do wrong


def test_nothing_is_fetched_without_the_flag(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError) as error:
        detectors.load()
    hub = "facebook/mask2former-swin-small-coco-instance"
    for part in ("m2f-swin-s", hub, "0.3 GB", "--allow-download"):
        assert part in str(error.value)


def test_the_flag_fetches_safetensors_first_and_other_weights_only_without_them(
    monkeypatch, folders, tmp_path
):
    import huggingface_hub

    calls = []

    def fetch(hub, *, allow_patterns):
        calls.append((hub, allow_patterns[-1]))
        return str(folders / "m2f" if len(calls) == 2 else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert detectors.load(allow_download=True).name == "m2f-swin-s"
    hub = "facebook/mask2former-swin-small-coco-instance"
    assert calls == [(hub, "*.safetensors"), (hub, "pytorch_model*.bin")]

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="no route"):
        detectors.load("owlv2", allow_download=True)


def test_wrong_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json and model\.safetensors"):
        detectors.load("m2f-swin-l", tmp_path / "none")
    with pytest.raises(ValueError, match="type owlv2"):
        detectors.load("m2f-swin-s", folders / "owlv2")
    save_mask2former(tmp_path / "three", labels=3)
    with pytest.raises(ValueError, match="knows 3 classes"):
        detectors.load("m2f-swin-s", tmp_path / "three")
    with pytest.raises(ValueError, match="Did you mean 'owlv2'"):
        detectors.load("owlv")


def test_wrong_weights_are_not_replaced_by_random_ones(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(folders / "m2f" / "model.safetensors")
    state.pop("class_predictor.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders / "m2f" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks 1 weights .* class_predictor.weight"):
        detectors.load("m2f-swin-s", tmp_path)


def test_a_missing_tokenizer_is_named(folders, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "owlv2" / name).read_bytes())
    with pytest.raises(ValueError, match="preprocessor or a tokenizer"):
        detectors.load("owlv2", tmp_path)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        detectors.Mask2Former(net=RightHalf()).detect(IMAGE.float())
