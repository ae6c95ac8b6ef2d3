"""What teach recipes are made of: tokenizer, CLIP conversion, losses, stages that resume."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from diffdistill import teach
from diffdistill.data import shapes
from diffdistill.data.stream import TensorStream
from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch
from diffdistill.schedules import EDM
from diffdistill.teaching import clip, diffusion
from diffdistill.teaching.convert import clip_text_model
from diffdistill.teaching.tokenizer import word_tokenizer
from diffdistill.testing import gaussian


def small_clip(vocab=50):
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=16, vocab_size=vocab, width=32, heads=2, layers=2)
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()


def test_every_word_is_one_token_and_ids_survive_saving(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = word_tokenizer(shapes.vocabulary(), tmp_path, max_length=16)
    assert len(tokenizer) < 2000
    for i in range(60):
        caption = shapes.scene(i).caption
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a photo of an orange star left of a ring"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == 16


def test_converted_text_tower_gives_the_same_embedding():
    torch.manual_seed(0)
    model = small_clip()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    text = clip_text_model(model, bos=48, eos=49)
    ids = torch.randint(0, 40, (4, 16))
    ids[:, 0], ids[:, 9:] = 48, 49
    with torch.no_grad():
        pooled = text(ids)[0][:, 9] @ model.text_projection
        torch.testing.assert_close(pooled, model.encode_text(ids), atol=1e-5, rtol=0)


def test_text_tower_has_the_states_of_the_converted_model_and_can_be_locked():
    torch.manual_seed(0)
    model = small_clip()
    ids = torch.randint(0, 40, (4, 16))
    with torch.no_grad():
        states = clip_text_model(model, bos=48, eos=49)(ids)[0]
        torch.testing.assert_close(clip.TextTower(model)(ids), states, atol=1e-5, rtol=0)
    towers = clip.Towers(model)
    towers.lock_text()
    assert "clip.text_projection" in towers.trainable_names
    assert "clip.visual.conv1.weight" in towers.trainable_names
    assert not any("clip.transformer" in n or "embedding.w" in n for n in towers.trainable_names)


def test_contrastive_loss_is_low_only_for_matching_pairs():
    method = clip.Contrastive(clip.Config())

    class Fixed(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift
            self.clip = torch.nn.Module()
            self.clip.logit_scale = torch.nn.Parameter(torch.tensor(np.log(50.0)))

        def forward(self, images, ids):
            text = torch.eye(8).roll(self.shift, 0)
            return torch.eye(8)[:4], text[: len(ids)]

    batch = Batch(
        4, (3, 32, 32), {}, x=torch.zeros(4, 3, 32, 32),
        extra={"ids": torch.arange(4)[:, None], "hard_ids": torch.arange(4, 8)[:, None]},
    )  # fmt: skip
    losses = []
    for shift in (0, 1):
        method.attach({"student": Fixed(shift)})
        out = method.loss(batch)
        losses.append((out["image"] + out["text"]).item())
    assert losses[0] < 1e-6 < 10 < losses[1]


def test_a_denoiser_learns_a_gaussian_from_samples():
    """The teacher objective recovers mean and std; its null condition is used for a tenth."""
    x = 0.7 + 0.3 * torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    net = gaussian((0.0,), 1.0, EDM(t_max=5.0)).net
    denoiser = Denoiser(net, EDM(t_max=5.0), "x0", shape=(1,), sigma_data=0.5)
    method = diffusion.Diffusion(diffusion.Config(times="lognormal"), denoiser)
    stream = TensorStream(len(x), (1,), {}, x=x)
    from pathlib import Path
    from tempfile import TemporaryDirectory

    settings = {"steps": 400, "batch_size": 256, "lr": 0.01, "ema": 0.99, "weight_decay": 0.0}
    with TemporaryDirectory() as folder:
        out = Path(folder)
        acc = Accelerator(cpu=True)
        teach.train_stage("diffusion", method, denoiser, stream, settings, out, acc)
        assert net.mean.item() == pytest.approx(0.7, abs=0.03)
        assert abs(net.std.item()) == pytest.approx(0.3, abs=0.03)
        state = json.loads((out / "diffusion/checkpoints/step_000400/state.json").read_text())
        assert state["step"] == 400


def test_a_text_tower_learns_to_tell_the_facts_of_a_caption():
    """Only the reading loss, on the captions of 600 scenes: chance is about 7, sure is 0."""
    torch.manual_seed(0)
    scenes = [shapes.scene(i) for i in range(600)]
    words = {w: i for i, w in enumerate(sorted({w for s in scenes for w in s.caption.split()}))}
    ids = torch.full((600, 16), len(words))
    for row, scene in zip(ids, scenes, strict=True):
        found = [words[w] for w in scene.caption.split()]
        row[: len(found)] = torch.tensor(found)
    facts = torch.tensor([shapes.facts(s.record) for s in scenes])
    net = diffusion.PromptNet(
        torch.nn.Identity(), clip.TextTower(small_clip(len(words) + 1)), 32, 2, shapes.FACTS
    )
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(net.reading_loss(ids, facts))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 5 and losses[-1] < 1.5


def test_unknown_teach_recipe_names_the_known_ones(capsys):
    assert teach.main(["recipe=shapes-sdd"]) == 2
    assert "Did you mean 'shapes-sd'" in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys):
    (tmp_path / "recipe.json").write_text('{"recipe": "shapes-dit", "steps": 7}')
    assert teach.main(["recipe=shapes-dit", f"out={tmp_path}"]) == 2
    assert "holds what other settings made" in capsys.readouterr().err
    assert "7" in (tmp_path / "recipe.json").read_text()
