"""How autoregressive teachers are taught: tokenizer, transformer, and the recipes in miniature."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from omegaconf import OmegaConf

from diffdistill import config, teach
from diffdistill.data import fashion
from diffdistill.method import Batch
from diffdistill.pipelines.loading import load_pipeline
from diffdistill.teachers import load_teacher
from diffdistill.teaching import next_token, vq, worlds
from diffdistill.testing import tiny_tokens


def quantiser(kind, **options):
    codes = vq.Codes(tiny_tokens(kind).tokenizer).train()
    method = vq.Quantiser(vq.Config(**options))
    method.attach({"student": codes})
    return method, codes


def batch(n=32, seed=0):
    """Smooth pictures: a bright bar somewhere."""
    rng = torch.Generator().manual_seed(seed)
    place = torch.randint(8, (n, 1, 1, 1), generator=rng)
    x = 1.0 - 0.5 * (torch.arange(8) - place).abs()
    return Batch(n, (1, 8, 8), {}, x.expand(n, 1, 8, 8).clamp(-1, 1).contiguous())


@pytest.mark.parametrize("kind", ["raster", "scales"])
def test_gradients_pass_straight_through_the_codes(kind):
    method, codes = quantiser(kind)
    net = codes.tokenizer
    losses = method.loss(batch())
    encoder, book = net.quant_conv.weight, net.book
    image = torch.autograd.grad(losses["l2"], (encoder, book), retain_graph=True, allow_unused=True)
    assert image[0].abs().sum() > 0 and image[1] is None  # pixels teach the encoder, not the codes
    pulled = torch.autograd.grad(losses["codebook"], (book, encoder), retain_graph=True,
                                 allow_unused=True)  # fmt: skip
    assert pulled[0].abs().sum() > 0 and pulled[1] is None
    kept = torch.autograd.grad(losses["commitment"], (encoder, book), allow_unused=True)
    assert kept[0].abs().sum() > 0 and kept[1] is None
    f = net.features(batch().x)
    _, sums, _ = net.quantise(f)
    want = torch.stack([F.mse_loss(s, f) for s in sums]).mean()
    torch.testing.assert_close(losses["codebook"], want)
    torch.testing.assert_close(losses["commitment"], 0.25 * want)


@pytest.mark.parametrize("kind", ["raster", "scales"])
def test_a_tokenizer_learns_pictures(kind):
    method, codes = quantiser(kind)
    optimizer = torch.optim.AdamW(codes.parameters(), 1e-3)
    l2 = []
    for step in range(60):
        losses = method.loss(batch(seed=step))
        optimizer.zero_grad()
        sum(v for k, v in losses.items() if not k.startswith("_")).backward()
        optimizer.step()
        with torch.no_grad():
            method.revive()
        l2.append(losses["l2"].item())
    assert l2[-1] < 0.35 * l2[0]


@torch.no_grad()
def test_dead_codes_start_again_at_features():
    method, codes = quantiser("raster", reseed_every=3, reseed_until=6)
    method.loss(batch())
    method.revive()  # at the very beginning, all of them
    near = lambda codes: torch.cdist(codes, method._seen).amin(1).max()  # noqa: E731
    assert near(codes.tokenizer.book) < 1e-3
    codes.usage[:] = 1.0
    codes.usage[[2, 5]] = 0.01
    before = codes.tokenizer.book.clone()
    method.revive()
    assert torch.equal(codes.tokenizer.book, before)  # not yet: every third update
    method.revive()
    book = codes.tokenizer.book
    moved = (book != before).any(1)
    assert moved.nonzero().flatten().tolist() == [2, 5] and (codes.usage == 1).all()
    assert near(book[[2, 5]]) < 1e-3
    codes.updates.fill_(8)
    codes.usage[:] = 0.0
    method.revive()
    assert torch.equal(codes.tokenizer.book, book)  # too late


def sharpened(weight, steps=120):
    """What a decoder makes of one code for pictures that are all dark or all bright."""
    torch.manual_seed(0)
    net = tiny_tokens().tokenizer
    before = {k: v.clone() for k, v in net.state_dict().items()}
    method = vq.Sharpener(vq.SharpenerConfig(gan=weight, r1=0.01), net)
    decoder = torch.nn.ModuleList([net.post_quant_conv, net.decoder])
    method.attach({"student": decoder, "discriminator": vq.patch_critic(1, 16)})
    ours, theirs = (
        torch.optim.Adam(role.parameters(), 2e-3, betas=(0.0, 0.99))
        for role in (decoder, method.discriminator)
    )
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        x = (2.0 * torch.randint(2, (16, 1, 1, 1), generator=rng) - 1).expand(16, 1, 8, 8)
        data = Batch(16, (1, 8, 8), {}, x, extra={"tokens": torch.zeros(16, 4).long()})
        for loss, optimizer in ((method.loss, ours), (method.critic_loss, theirs)):
            losses = loss(data)
            optimizer.zero_grad()
            sum(v for k, v in losses.items() if not k.startswith("_")).backward()
            optimizer.step()
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("decoder.", "post_quant_conv.")) for k in moved)
    with torch.no_grad():
        return net.decode(net.codebook[torch.zeros(1, 4).long()]).abs().mean().item()


def test_a_sharpened_decoder_takes_sides_where_the_mean_is_grey():
    assert sharpened(1.0) > 0.7


def test_wrong_sharpening_without_or_against_the_critic_stays_grey():
    assert sharpened(0.0) < 0.5 and sharpened(-1.0) < 0.5


@torch.no_grad()
def test_next_token_loss_is_the_likelihood_and_labels_are_dropped():
    model = tiny_tokens().model()
    tokens = torch.randint(12, (64, 4))
    data = Batch(64, (4, 4), {"label": torch.arange(64) % 10}, extra={"tokens": tokens})
    for rate, label in ((0.0, data.cond["label"]), (1.0, torch.full((64,), 10))):
        method = next_token.NextToken(next_token.Config(cond_dropout=rate))
        method.attach({"student": model})
        log_p = model.logits(model.vectors(tokens), {"label": label}).log_softmax(-1)
        want = -log_p.gather(-1, tokens[..., None]).mean()
        torch.testing.assert_close(method.loss(data)["nll"], want)


@pytest.fixture
def few_clothes(monkeypatch):
    pixels = torch.randint(0, 256, (48, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(fashion, "load", lambda _: (pixels.byte(), torch.arange(48) % 10))


@pytest.mark.parametrize("name", ["fashion-ar", "fashion-var"])
def test_the_recipes_make_teachers_and_resume(name, few_clothes, tmp_path):
    settings = OmegaConf.to_container(OmegaConf.load(config.folder("teach") / f"{name}.yaml"))
    settings["tokenizer"] |= {"widths": [16, 16, 16], "latent": 16, "codes": 12}
    settings["transformer"] |= {"width": 32, "layers": 1, "heads": 2}
    for stage, steps in (("quantiser", 3), ("sharpener", 2), ("next_token", 2)):
        settings[stage] |= {"steps": steps, "batch_size": 8}
    make = getattr(worlds, name.replace("-", "_"))
    acc = Accelerator(cpu=True)
    out = make(settings, tmp_path, acc, teach.train_stage)
    generator = load_pipeline(out)
    groups = 16 if name == "fashion-ar" else 4
    assert generator.info["steps"] == groups and generator.info["guidance"] == settings["guidance"]
    image = generator.sample([3], [0])
    assert image.shape == (1, 1, 28, 28)
    teacher = load_teacher(str(out))
    assert teacher.info["protocol"] == "fashion-v1" and teacher.denoiser.shape[1] == 8
    card = (out / "README.md").read_text()
    assert "test NLL" in card and card.count("scores -->") == 2 and "Not measured yet" in card
    log = (tmp_path / "next_token" / "metrics.jsonl").read_text()
    shutil.rmtree(out)
    again = load_pipeline(make(settings, tmp_path, acc, teach.train_stage))  # nothing left to train
    assert torch.equal(again.sample([3], [0]), image)
    assert (tmp_path / "next_token" / "metrics.jsonl").read_text() == log
    assert json.loads((out / "diffdistill.json").read_text())["recipe"]["recipe"] == name
