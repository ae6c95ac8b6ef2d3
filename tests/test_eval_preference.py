"""Preference scorers on small random checkpoints in the layouts that are published."""

import json
import math
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffdistill.eval import metrics, pixels, preference, weights

TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    },
}  # fmt: skip


def noise(n, size, wide=None, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, wide or size), generator=made, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A CLIP with an image tower that sees, and its checkpoint under the key `state_dict`."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "tiny-judge.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-judge.json")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY).eval()
    for p in (model.visual.conv1.weight, model.token_embedding.weight):
        nn.init.normal_(p, std=0.5)
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return path, model


def cosine(model, view, images, prompts):
    with torch.no_grad():
        a = model.encode_image(torch.stack([view(p) for p in pixels.pictures(images)]))
        b = model.encode_text(open_clip.get_tokenizer("tiny-judge")(prompts))
    return F.cosine_similarity(a, b).numpy()


def test_hps_is_the_cosine_of_padded_pictures(tiny):
    path, model = tiny
    scorer = preference.HPSv2(path, architecture="tiny-judge")
    images, prompts = noise(3, 40, 64), ["a cat", "a dog", "red"]
    padded = open_clip.image_transform(32, is_train=False, resize_mode="longest")
    cropped = open_clip.image_transform(32, is_train=False)
    found = scorer.score(images, prompts)
    np.testing.assert_allclose(found, cosine(model, padded, images, prompts), atol=1e-5)
    assert np.abs(found - cosine(model, cropped, images, prompts)).max() > 1e-3
    assert scorer.name == f"hpsv2.1:{weights.digest(path)[:8]}"
    assert preference.HPSv2(path, version="v2", architecture="tiny-judge").name != scorer.name


def test_hps_refuses_other_versions_and_unpaired_prompts(tiny):
    with pytest.raises(ValueError, match=r"Give v2 or v2\.1"):
        preference.HPSv2(tiny[0], version="v3", architecture="tiny-judge")
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        preference.HPSv2(tiny[0], architecture="tiny-judge").score(noise(2, 32), ["x"])


def test_hps_table_has_styles_groups_and_a_mean_of_all_pictures():
    scores = {"anime": np.repeat([1.0, 3.0], 10), "photo": np.zeros(60)}
    found = preference.hps_benchmark(scores)
    assert found["styles"] == {
        "anime": {"mean": 2.0, "std": 1.0}, "photo": {"mean": 0.0, "std": 0.0},
    }  # fmt: skip
    assert found["mean"] == pytest.approx(40 / 80)
    with pytest.raises(ValueError, match="Give a multiple of 10"):
        preference.hps_benchmark({"anime": [1.0] * 11})


# ---- heads ------------------------------------------------------------------------------


def head(prefix, width):
    """The published table of tensors: dropout takes numbers, and there is none before the last."""
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    made = torch.Generator().manual_seed(1)
    state = {}
    for i, shape in sizes.items():
        state[f"{prefix}{i}.weight"] = torch.randn(shape, generator=made) / math.sqrt(shape[1])
        state[f"{prefix}{i}.bias"] = torch.randn(shape[:1], generator=made)
    return state


def through(state, prefix, x, between=lambda h: h):
    for i in (0, 2, 4, 6, 7):
        x = between(x @ state[f"{prefix}{i}.weight"].T + state[f"{prefix}{i}.bias"])
    return x[:, 0]


def test_aesthetic_head_is_linear_on_the_unit_embedding(tiny, tmp_path):
    path, _ = tiny
    state = head("layers.", 12)
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    scorer = preference.Aesthetic(
        tmp_path / "sac+logos+ava1-l14-linearMSE.pth", path, architecture="tiny-judge"
    )
    head_file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    parts = [weights.digest(file)[:8] for file in (head_file, path)]
    assert scorer.name == f"aesthetic:{parts[0]}+{parts[1]}"
    images = noise(4, 32)
    embedding = torch.from_numpy(scorer.net.features(images)).float()
    found = scorer.score(images)
    want = through(state, "layers.", F.normalize(embedding))
    np.testing.assert_allclose(found, want, rtol=1e-4)
    for wrong in (
        through(state, "layers.", embedding),
        through(state, "layers.", F.normalize(embedding), torch.relu),
    ):
        assert np.abs(found - wrong.numpy()).max() > 1e-2


def test_a_checkpoint_without_the_head_is_refused(tiny):
    with pytest.raises(ValueError, match="it is not this scorer's checkpoint"):
        preference.Aesthetic(tiny[0], tiny[0], architecture="tiny-judge")


# ---- PickScore --------------------------------------------------------------------------


def test_pickscore_is_logit_scale_times_cosine(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = small | {"vocab_size": len(words), "max_position_embeddings": 16,
                    "eos_token_id": len(words) - 1}  # fmt: skip
    vision = small | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(tmp_path / "pick")
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
    ).save_pretrained(tmp_path / "processor")
    scorer = preference.PickScore(tmp_path / "pick", tmp_path / "processor")
    images, prompts = noise(2, 48), ["a cat", "b"]
    inputs = scorer.net.processor(
        text=prompts, images=pixels.pictures(images), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        want = model(**inputs).logits_per_image.diagonal().numpy()
    np.testing.assert_allclose(scorer.score(images, prompts), want, rtol=1e-4)
    assert scorer.name.startswith(f"pickscore:{weights.digest(tmp_path / 'pick')[:8]}+")
    (tmp_path / "processor" / "more.json").write_text("{}")
    other = preference.PickScore(tmp_path / "pick", tmp_path / "processor")
    assert other.name != scorer.name  # the processor is a part of the key


# ---- ImageReward ------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red"]
VISION, TEXT = 24, 16  # widths


def bert(state, ids, mask, image):
    """BERT that reads both ways, and a picture in every layer: written down from the papers."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def attend(name, x, other, keep=None):
        q, k, v = (
            linear(f"{name}.self.{n}", y).unflatten(-1, (2, TEXT // 2)).transpose(1, 2)
            for n, y in (("query", x), ("key", other), ("value", other))
        )
        logits = q @ k.transpose(2, 3) / math.sqrt(TEXT // 2)
        if keep is not None:
            logits = logits.masked_fill(keep[:, None, None] == 0, -torch.inf)
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", out) + x)

    x = state["embeddings.word_embeddings.weight"][ids]
    x = x + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm("embeddings.LayerNorm", x)
    for i in range(2):
        at = f"encoder.layer.{i}"
        x = attend(f"{at}.attention", x, x, mask)
        x = attend(f"{at}.crossattention", x, image)
        inner = linear(f"{at}.output.dense", F.gelu(linear(f"{at}.intermediate.dense", x)))
        x = norm(f"{at}.output.LayerNorm", inner + x)
    return x


def bert_shapes():
    """Names and shapes of the text encoder in BLIP's own naming."""
    shapes = {
        "embeddings.word_embeddings.weight": (len(WORDS), TEXT),
        "embeddings.position_embeddings.weight": (40, TEXT),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(2):
        at = f"encoder.layer.{i}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            for part, wide in (("query", TEXT), ("key", width), ("value", width)):
                shapes[f"{at}.{kind}.self.{part}.weight"] = (TEXT, wide)
            shapes[f"{at}.{kind}.output.dense.weight"] = (TEXT, TEXT)
            norms.append(f"{at}.{kind}.output.LayerNorm")
        shapes[f"{at}.intermediate.dense.weight"] = (32, TEXT)
        shapes[f"{at}.output.dense.weight"] = (TEXT, 32)
        norms.append(f"{at}.output.LayerNorm")
    biases = {n.removesuffix("weight") + "bias": (s[0],) for n, s in shapes.items() if "dense" in n
              or ".self." in n}  # fmt: skip
    return shapes | biases | {f"{n}.{w}": (TEXT,) for n in norms for w in ("weight", "bias")}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A small ImageReward.pt: timm's transformer, whose names BLIP has, and the text encoder."""
    from timm.models.vision_transformer import VisionTransformer

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=VISION, depth=2, num_heads=3, num_classes=0
    ).eval()
    for p in vit.parameters():
        nn.init.normal_(p, std=0.3)
    text = {name: torch.randn(shape) * 0.5 for name, shape in bert_shapes().items()}
    state = {f"blip.visual_encoder.{k}": v for k, v in vit.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state |= head("mlp.layers.", TEXT)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "bert" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    scorer = preference.ImageReward(folder / "ImageReward.pt", folder / "bert", heads=(3, 2))
    return scorer, vit, text, state


def test_imagereward_is_its_papers_chain(reward):
    """Picture by timm, text by a transcription of the papers: first token, head, mean and std."""
    scorer, vit, text, state = reward
    images, prompts = noise(2, 40), ["a red Cat", "dog"]
    view = open_clip.image_transform(32, is_train=False)
    ids = torch.zeros(2, 35, dtype=torch.int64)
    ids[0, :5] = torch.tensor([2, 5, 8, 6, 3])
    ids[1, :3] = torch.tensor([2, 7, 3])
    with torch.no_grad():
        seen = vit.forward_features(torch.stack([view(p) for p in pixels.pictures(images)]))
        first = bert(text, ids, ids > 0, seen)[:, 0]
    want = (through(state, "mlp.layers.", first) - 0.16717) / 1.03334
    np.testing.assert_allclose(scorer.score(images, prompts), want, rtol=1e-4, atol=1e-4)
    assert re.fullmatch(r"imagereward:[0-9a-f]{8}\+[0-9a-f]{8}", scorer.name)


def test_imagereward_reads_35_tokens_of_the_prompt_and_the_picture(reward):
    scorer = reward[0]
    images, long = noise(1, 32), "cat " * 33
    cut = scorer.score(images, [long])
    np.testing.assert_allclose(cut, scorer.score(images, [long + "dog dog"]), atol=1e-6)
    assert abs(cut - scorer.score(images, ["dog " * 33]))[0] > 1e-4
    assert abs(cut - scorer.score(noise(1, 32, seed=3), [long]))[0] > 1e-4


def test_imagereward_refuses_a_checkpoint_without_blip(reward, tmp_path):
    state = {k: v for k, v in reward[3].items() if not k.startswith("blip.")}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds no BLIP. Give ImageReward\.pt"):
        preference.ImageReward(tmp_path / "x.pt", tmp_path)


# ---- by name ----------------------------------------------------------------------------


def test_scorers_by_name_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    assert set(preference.SCORERS) <= set(metrics.METRICS)
    for name, (sources, _) in preference.SCORERS.items():
        with pytest.raises(ValueError, match=f"the weights {sources[0]} .*--allow-download"):
            preference.scorer(name)
    with pytest.raises(ValueError, match=r"Did you mean 'hpsv2\.1'"):
        preference.scorer("hpsv21")


def test_a_scorer_is_built_from_paths_in_the_order_of_its_weights(reward, tmp_path, monkeypatch):
    """Both of ImageReward's; its published sizes do not fit the small checkpoint's heads."""
    seen = []
    monkeypatch.setattr(preference, "ImageReward", lambda *a, **k: seen.append(a))
    file, words = tmp_path / "ImageReward.pt", tmp_path / "bert"
    file.touch(), words.mkdir()
    preference.scorer("imagereward", [file, words])
    assert seen == [(file, words)]
