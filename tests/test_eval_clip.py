"""CLIP scores: tokens, activations, scales, and the two libraries, on small random networks."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch

from diffdistill.eval import clip, metrics, networks, pixels, weights

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip


def noise(n, size, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=made, dtype=torch.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two architectures that open_clip knows by name, and a checkpoint that fits both."""
    folder = tmp_path_factory.mktemp("clip")
    for name, config in (("tiny", TINY), ("tiny-quickgelu", TINY | {"quick_gelu": True})):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY).eval()
    for p in (model.visual.conv1.weight, model.token_embedding.weight):
        torch.nn.init.normal_(p, std=0.5)
    model.logit_scale.data.fill_(math.log(50))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
               folder / "weights.pt")  # fmt: skip
    return folder / "weights.pt", model


# ---- tokens -----------------------------------------------------------------------------


def test_17_prefix_stands_after_sot_and_long_captions_end_in_eot():
    tokenizer = open_clip.get_tokenizer("ViT-g-14")
    ids = clip.tokens(tokenizer, ["a cat", "cat " * 100], clip.PREFIX)
    assert ids.shape == (2, 77) and ids[:, :4].tolist() == [[49406, 320, 1125, 29340]] * 2
    cat = tokenizer.encode("cat")[0]
    assert ids[0, 4:8].tolist() == [320, cat, 49407, 0]
    assert ids[1, 75:].tolist() == [cat, 49407]


def test_17_without_a_prefix_tokens_are_open_clips():
    tokenizer = open_clip.get_tokenizer("ViT-g-14")
    prompts = ["A Red cup &amp; saucer", "", "dog " * 90]
    assert torch.equal(clip.tokens(tokenizer, prompts), tokenizer(prompts))


def test_17_wrong_cut_of_the_ids_loses_eot():
    tokenizer = open_clip.get_tokenizer("ViT-g-14")
    wrong = [49406, 320, 1125, 29340, *tokenizer.encode("cat " * 100), 49407][:77]
    assert 49407 not in wrong
    assert 49407 in clip.tokens(tokenizer, ["cat " * 100], clip.PREFIX)[0]


# ---- open_clip --------------------------------------------------------------------------


def test_open_clip_loads_a_local_file_and_matches_the_library(tiny):
    path, model = tiny
    net = clip.OpenClip("tiny", path)
    images, prompts = noise(3, 48), ["a cat", "two dogs", "x"]
    view = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        seen = model.encode_image(torch.stack([view(p) for p in pixels.pictures(images)]))
        read = model.encode_text(open_clip.get_tokenizer("tiny")(prompts))
    np.testing.assert_allclose(net.features(images), seen, atol=1e-5)
    np.testing.assert_allclose(net.text(prompts), read, atol=1e-5)
    assert net.scale == pytest.approx(50) and net.name == f"tiny:{weights.digest(path)[:8]}"


def test_openais_weights_with_plain_gelu_are_an_error(tiny, tmp_path):
    """By name, and as the TorchScript archives that OpenAI publishes."""
    path, model = tiny
    named = tmp_path / "openai-vit.pt"
    torch.save(model.state_dict(), named)
    for file in (named, script(model, tmp_path / "ViT.pt")):
        with pytest.raises(ValueError, match=r"need quick GELU.*Use tiny-quickgelu"):
            clip.OpenClip("tiny", file)
        quick = clip.OpenClip("tiny-quickgelu", file)
        plain = clip.OpenClip("tiny", path)
        images = noise(2, 32)
        assert np.abs(quick.features(images) - plain.features(images)).max() > 1e-4


def script(model, path):
    """A TorchScript archive in half precision, with the three extra entries of OpenAI's."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    holder = Holder()
    for name, value in model.state_dict().items():
        at = holder
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, Holder())
            at = getattr(at, part)
        at.register_buffer(last, value.half())
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        holder.register_buffer(name, torch.tensor(value))
    torch.jit.script(holder).save(str(path))
    return path


def test_half_precision_weights_run_in_float32(tiny, tmp_path):
    net = clip.OpenClip("tiny-quickgelu", script(tiny[1], tmp_path / "half.pt"))
    assert {p.dtype for p in net.model.parameters()} == {torch.float32}


def test_weights_of_another_architecture_are_refused(tiny, tmp_path):
    path, _ = tiny
    with pytest.raises(ValueError, match="does not fit ViT-B-32"):
        clip.OpenClip("ViT-B-32", path)
    with pytest.raises(ValueError, match="Did you mean 'tiny'"):
        clip.OpenClip("tinny", path)


def test_cmmd_crops_before_it_resizes(tiny):
    path, _ = tiny
    net = clip.cmmd_network(path, architecture="tiny")
    wide = torch.cat([noise(1, 64), noise(1, 64, seed=1)], 3)
    np.testing.assert_array_equal(net.features(wide), net.features(pixels.centre_crop(wide)))
    assert net.resize == "square-open_clip-bicubic-shortest-32"
    assert networks.NETWORKS["clip-vitl14-336"][0] in weights.SOURCES


# ---- published settings -----------------------------------------------------------------


class Known:
    """Cosines 0.6 and -0.8, a scale of 100; it remembers what it is shown."""

    name, scale = "known", 100.0

    def features(self, images):
        self.seen = images.shape[-1]
        return np.array([[3.0, 4.0], [3.0, 4.0]])

    def text(self, prompts, prefix=""):
        self.prefix = prefix
        return np.array([[7.0, 0.0], [0.0, -2.0]])


@pytest.mark.parametrize(
    ("name", "want", "prefix", "size"),
    [
        ("clip-g14-gigagan", (0.6 - 0.8) / 2, "A photo depicts ", 256),
        ("clip-b32-gigagan", (0.6 - 0.8) / 2, "A photo depicts ", 256),
        ("clip-g14-plain", (0.6 - 0.8) / 2, "", 40),
        ("clip-l14-sana", 100 * (0.6 - 0.8) / 2, "", 40),
        ("clip-torchmetrics", 0.0, "", 40),
        ("clip-hessel", 2.5 * (0.6 + 0) / 2, "A photo depicts ", 40),
    ],
)
def test_published_scores_have_their_own_scale_prefix_and_size(name, want, prefix, size):
    net = Known()
    each = clip.score_each(name, net, noise(2, 40), ["a", "b"])
    assert clip.score(name, each) == pytest.approx(want)
    assert (net.prefix, net.seen) == (prefix, size)
    given = {name: each}
    assert metrics.measure([name], given)[0] == {name: pytest.approx(want)}


def test_every_setting_names_weights_and_an_architecture_with_the_right_gelu():
    assert tuple(clip.SETTINGS) == metrics.CLIP_SETTINGS
    for rules in clip.SETTINGS.values():
        source = weights.SOURCES[rules.weights]
        if rules.model != "transformers":
            config = open_clip.get_model_config(rules.model)
            assert bool(config.get("quick_gelu")) == ("openaipublic" in source.address)
    with pytest.raises(ValueError, match="Did you mean 'clip-g14-plain'"):
        clip.setting("clip-g14-plan")


def test_missing_weights_of_a_setting_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"ViT-L-14.pt.*890 MiB.*--allow-download"):
        clip.network_of("clip-l14-sana")


# ---- transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging(tmp_path_factory):
    """A small CLIPModel, its processor, and a tokenizer of letters, in one folder."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    folder = tmp_path_factory.mktemp("hf")
    letters = [chr(i) for i in range(97, 123)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
            "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.logit_scale.data.fill_(math.log(20))
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder, model


def test_hugging_face_variant_is_the_models_own_cosine(hugging):
    folder, model = hugging
    net = clip.HuggingFaceClip(folder)
    images, prompts = noise(3, 40), ["a cat", "b", "dog"]
    inputs = net.processor(
        text=prompts, images=pixels.pictures(images), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        want = model(**inputs).logits_per_image.diagonal() / 20
    each = clip.score_each("clip-torchmetrics", net, images, prompts)
    np.testing.assert_allclose(each, 100 * want.numpy(), rtol=1e-4)
    assert net.scale == pytest.approx(20)


def test_hugging_face_variant_cuts_long_prompts_in_the_tokenizer(hugging):
    """Beyond the context nothing changes, because the last token stays EOT."""
    folder, _ = hugging
    net = clip.HuggingFaceClip(folder)
    long = "abcd" * 30
    np.testing.assert_allclose(net.text([long]), net.text([long + " more"]), atol=1e-6)
    assert np.abs(net.text([long]) - net.text([long[1:]])).max() > 1e-3


def test_pooled_takes_a_tensor_or_the_object_of_transformers_5():
    class Output:
        pooler_output = torch.ones(2)

    assert torch.equal(clip.pooled(Output()), clip.pooled(torch.ones(2)))
