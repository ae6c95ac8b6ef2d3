"""Known-answer tests of Flash-DMD, its pixel GAN, rewards and joint RL, numbered as in the spec."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffdistill import config, passes, run
from diffdistill.data import shapes
from diffdistill.data.stream import TensorStream
from diffdistill.denoiser import Denoiser
from diffdistill.methods import flash_dmd
from diffdistill.parts import pixel_gan, preference
from diffdistill.parts.lora import lora_copy
from diffdistill.parts.pull import copier, ema_pull
from diffdistill.parts.reward import Reward, load_reward, rewards_of
from diffdistill.schedules import EDM, TrigFlow, add_noise, bcast, times
from diffdistill.teachers import load_teacher
from diffdistill.testing import (
    TinyConvNet,
    gaussian,
    run_method,
    shifted,
    student_samples,
    tiny_denoiser,
)

SMALL = EDM(t_max=5.0)
FOUR = flash_dmd.FlashDMD(flash_dmd.Config(), gaussian((0.0,), 1.0, SMALL)).sampler().times


class Scaled(nn.Module):
    """A discriminator of one-dimensional samples: 2 x, or a constant."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x


class PerStep(nn.Module):
    """A student with one scalar for each of its steps."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, z, t):
        i = (torch.tensor(FOUR) - t[0]).abs().argmin()
        return self.gain[i] * z / bcast(t, z)


def flash(monkeypatch, teacher=None, student=None, **options):
    """An engine in one dimension."""
    monkeypatch.setattr(pixel_gan, "pixel_gan", lambda teacher, **_: Scaled())
    engine = run_method(
        "flash_dmd", teacher or gaussian((1.0,), 0.4, SMALL), batch_size=options.pop("batch", 16),
        x=torch.randn(64, 1), **{"steps": 1, "train": False} | options,
    )  # fmt: skip
    if student is not None:
        engine.method._roles["student"] = Denoiser(student, SMALL, "x0", shape=(1,))
    return engine


@pytest.fixture
def up(tmp_path):
    """A reward: the value itself."""
    (tmp_path / "up.py").write_text("def up(x, t, prompts):\n    return x[:, 0]\n")
    return f"{tmp_path}/up.py:up"


# ---- 1 the pull -------------------------------------------------------------------------


def test_1_ema_pull():
    psi, theta = nn.Linear(1, 1), nn.Linear(1, 1)
    for p in psi.parameters():
        nn.init.ones_(p)
    for p in theta.parameters():
        nn.init.zeros_(p)
    for n in (1, 2, 3):
        ema_pull(psi, theta, 0.97)
        assert psi.weight.item() == pytest.approx(0.97**n, abs=1e-6)
    assert psi.weight.item() == pytest.approx(0.912673, abs=1e-6)
    assert theta.weight.item() == 0 and theta.bias.item() == 0


@pytest.mark.parametrize("reversed_", [False, True])
def test_1_a_reversed_pull_is_wrong_and_moves_the_student(monkeypatch, reversed_):
    if reversed_:
        monkeypatch.setattr(flash_dmd, "ema_pull", lambda f, s, d: ema_pull(s, f, d))
    engine = flash(monkeypatch, gan=0.0, pull=0.5)
    student, fake = engine.method.student.net, engine.method.fake_score.net
    with torch.no_grad():
        fake.mean.fill_(3.0)
    engine.method.pull()
    if reversed_:
        assert (student.mean.item(), fake.mean.item()) == (2.0, 3.0)
    else:
        assert (student.mean.item(), fake.mean.item()) == (1.0, 2.0)


def test_1_an_adapter_pulls_with_the_weights_that_it_makes():
    teacher = Denoiser(TinyConvNet(), SMALL, "x0", shape=(1, 8, 8))
    student, fake = lora_copy(teacher, 2, 4.0, "all"), teacher.clone()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_()
    before = {n: p.clone() for n, p in fake.named_parameters()}
    ema_pull(fake, student, 0.75)
    layer = student.net.get_submodule("mid.1")
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    want = 0.75 * before["net.mid.1.weight"] + 0.25 * merged
    torch.testing.assert_close(fake.net.mid[1].weight, want)
    assert not torch.equal(fake.net.mid[1].weight, before["net.mid.1.weight"])
    for name in ("net.mid.1.bias", "net.label.weight"):  # the student trains neither
        assert torch.equal(dict(fake.named_parameters())[name], before[name])
    copier()(student, fake)
    assert torch.equal(fake.net.mid[1].weight, merged)
    with pytest.raises(ValueError, match="no parameter that the student trains"):
        ema_pull(nn.Linear(1, 1), teacher, 0.5)


# ---- 2 one loss for each step -----------------------------------------------------------


def slopes(engine, seed, **parts):
    """Gradient of each step's scalar, and (high, low) steps of these draws."""
    method, batch = engine.method, engine._micro_batches(0)[0]
    high, low = (
        v for s in [batch.shared.manual_seed(seed)] for v in (batch.randint(2), batch.randint(2))
    )
    batch.shared.manual_seed(seed)
    torch.manual_seed(seed)
    losses = method.student_loss(batch)
    total = sum(v for k, v in losses.items() if k in parts.get("only", ("matching", "gan")))
    (grad,) = torch.autograd.grad(total, [method.student.net.gain])
    return grad, high, 2 + low


def test_2_matching_moves_the_noisier_steps_and_the_gan_the_others(monkeypatch):
    engine = flash(monkeypatch, student=PerStep(), gan=0.1)
    method, seen = engine.method, set()
    psi, phi, critic = method.fake_score, method.teacher, method.discriminator
    with torch.no_grad():
        psi.net.mean.fill_(0.2)
    for seed in range(12):
        method.teacher = phi
        plain, high, low = slopes(engine, seed)
        seen |= {high, low}
        assert {i for i in range(4) if plain[i] != 0} == {high, low}
        method._roles["discriminator"] = Scaled(0.0)
        constant, *_ = slopes(engine, seed)
        assert constant[high] == plain[high] and constant[low] == 0
        method._roles["discriminator"], method.teacher = critic, psi
        matched, *_ = slopes(engine, seed)
        assert matched[high] == 0 and matched[low] == plain[low]
    assert seen == {0, 1, 2, 3}


def test_2_finished_samples_with_a_gradient_are_wrong_and_train_the_noisier_steps(monkeypatch):
    def attached(denoise, schedule, x0, cond, sampler, index):
        for s in sampler.times[index + 1 :]:
            t = times(s, x0)
            x0 = denoise(add_noise(schedule, x0, torch.randn_like(x0), t), t, cond)
        return x0

    right = flash(monkeypatch, student=PerStep(), gan=0.1)
    grad, high, low = slopes(right, 0, only=("gan",))
    assert grad[high] == 0 and grad[low] != 0
    monkeypatch.setattr(preference, "finished", attached)
    grad, high, low = slopes(right, 0, only=("gan",))
    assert grad[high] != 0


def test_2_the_last_noisier_step_is_detached_even_if_nothing_follows():
    x = torch.ones(2, 1, requires_grad=True)
    sampler = flash_dmd.FlashDMD(flash_dmd.Config(), gaussian((0.0,), 1.0, SMALL)).sampler()
    assert not preference.finished(lambda z, t, c: z, SMALL, x, {}, sampler, 3).requires_grad


# ---- 3 to 5 the preference loss ---------------------------------------------------------

STEP = TrigFlow(), math.acos(0.5)  # alpha 0.5, sigma^2 0.75


def gap(x, ref=1.0, win=1.0, lose=0.2, **options):
    one = lambda v: torch.tensor([[v]]) if isinstance(v, float) else v  # noqa: E731
    return preference.log_ratio_gap(
        STEP[0], one(x), one(ref), one(win), one(lose), STEP[1], **options
    )


def test_3_preference_loss_at_the_reference():
    x = torch.tensor([[1.0]], requires_grad=True)
    h = gap(x)
    loss = preference.preference_loss(h, 1.0)
    loss.sum().backward()
    assert h.item() == 0 and loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert x.grad.item() == pytest.approx(-0.266667, abs=1e-6)


def test_4_preference_loss_off_the_reference():
    h = gap(1.2)
    assert h.item() == pytest.approx(0.106667, abs=1e-6)
    assert preference.preference_loss(h, 1.0).item() == pytest.approx(0.641235, abs=1e-6)
    assert preference.preference_loss(h, 3.0).item() == pytest.approx(math.log1p(math.exp(-0.32)))


def test_4_the_gap_is_that_of_the_two_densities():
    x, r, win, lose = torch.randn(4, 3, 5, dtype=torch.float64)
    logp = lambda z, mean: -(z - 0.5 * mean).square().sum(1) / 1.5  # noqa: E731
    want = (logp(win, x) - logp(win, r)) - (logp(lose, x) - logp(lose, r))
    torch.testing.assert_close(gap(x, r, win, lose), want)
    torch.testing.assert_close(gap(x, r, win, lose, per_element=True), want / 5)


def test_5_winner_and_loser_swapped():
    x = torch.tensor([[1.2]], requires_grad=True)
    assert gap(x, win=0.2, lose=1.0).item() == pytest.approx(-gap(x).item())
    at_ref = torch.tensor([[1.0]], requires_grad=True)
    slopes_ = [
        torch.autograd.grad(preference.preference_loss(h, 1.0).sum(), at_ref)[0].item()
        for h in (gap(at_ref), gap(at_ref, win=0.2, lose=1.0))
    ]
    assert slopes_[0] == -slopes_[1] != 0


def test_5_the_reference_and_the_draws_get_no_gradient():
    parts = [torch.randn(1, 3, requires_grad=True) for _ in range(4)]
    gap(*parts).sum().backward()
    assert parts[0].grad is not None and all(p.grad is None for p in parts[1:])


@pytest.mark.parametrize(
    ("normalise", "threshold", "counts"),
    [
        ("std", 0.0, [True, True, False]),
        ("std", 2.45, [True, False, False]),  # (max - min) / std: 2.60 and 2.31
        ("softmax", 0.2, [True, False, False]),
        ("none", 0.5, [True, False, False]),
    ],
)
def test_best_and_worst(normalise, threshold, counts):
    rewards = torch.tensor([[1.0, 0.1, 2.0], [3.0, 0.1, 2.0], [2.0, 0.2, 2.0], [0.5, 0.1, 2.0]])
    win, lose, kept = preference.best_and_worst(rewards, normalise, threshold)
    assert (win.tolist()[:2], lose.tolist()[0]) == ([1, 2], 3) and rewards[lose[1], 1] < 0.15
    assert kept.tolist() == counts


def test_candidates_are_the_students_own_transition():
    x = torch.full((20_000, 1), 2.0)
    drawn = preference.candidates(*(STEP[0], x, STEP[1]), 4)
    assert drawn.shape == (4, 20_000, 1)
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.01)
    assert drawn.var().item() == pytest.approx(0.75, abs=0.01)
    assert torch.corrcoef(drawn[..., 0])[0, 1].abs() < 0.02


# ---- 6 who moves when -------------------------------------------------------------------


def turns(engine, steps):
    """Which losses each step has."""
    return [
        "".join(sorted({k.split("/")[0][0] for k in engine.train_step() if "grad_norm" not in k}))
        for _ in range(steps)
    ]


@pytest.mark.parametrize(("ttur", "updates"), [(2, 10), (1, 20)])
def test_6_every_turn_of_the_student_pulls_once(monkeypatch, ttur, updates):
    pulls = []
    monkeypatch.setattr(flash_dmd, "ema_pull", lambda *a: pulls.append(a))
    engine = flash(monkeypatch, steps=20, ttur=ttur, micro_batch=4)
    engine.fit()
    assert {n: r.updates for n, r in engine.roles.items()} == {
        "student": updates, "fake_score": 20, "discriminator": 20,
    }  # fmt: skip
    assert len(pulls) == updates
    assert all(p == (engine.method.fake_score, engine.method.student, 0.97) for p in pulls)


@pytest.mark.parametrize(
    ("ttur", "start", "want"),
    [
        (1, 0, "sc rc rc rc rc rc sc rc rc rc rc rc"),
        (2, 4, "sc c sc c rc c rc c rc c rc c sc c rc c rc c"),
        (1, 3, "sc sc sc rc rc rc sc rc rc rc rc rc sc"),
    ],
)
def test_6_preferences_and_distillation_take_turns(monkeypatch, up, ttur, start, want):
    pulls = []
    monkeypatch.setattr(flash_dmd, "ema_pull", lambda *a: pulls.append(a))
    want = ["".join(sorted(w)) for w in want.split()]
    engine = flash(
        monkeypatch, steps=len(want), ttur=ttur, rl_start=start, reward=up, rl_ratio=5
    )  # fmt: skip
    engine.stream.prompts = [None] * 64
    assert turns(engine, len(want)) == want
    role = engine.roles["student"]
    assert role.updates == role.total == len(pulls) == sum(w != "c" for w in want)
    assert engine.roles["fake_score"].updates == engine.roles["discriminator"].updates == len(want)
    assert engine.roles["reference"].updates == 0


def test_6_the_reference_is_the_student_of_the_moment_when_rl_starts(monkeypatch, up):
    engine = flash(monkeypatch, steps=6, ttur=1, rl_start=3, reward=up, rl_ratio=2)
    engine.stream.prompts = [None] * 64
    student, reference = engine.method.student.net, engine.method.reference.net
    for _ in range(3):
        engine.train_step()
    then = student.mean.clone()
    assert reference.mean.item() == 1.0 != then.item()
    for _ in range(3):
        engine.train_step()
    assert torch.equal(reference.mean, then) and not torch.equal(student.mean, then)


def test_6_critics_see_the_students_samples_and_repeat_no_pass(monkeypatch):
    engine = flash(monkeypatch, gan=0.1)
    method, batch = engine.method, engine._micro_batches(0)[0]
    method.student_loss(batch)
    before = method.student.passes
    assert not batch.memo["x"][0].requires_grad and not batch.memo["image"].requires_grad
    method.critic_loss(batch)
    assert method.student.passes == before
    alone = engine._micro_batches(0)[0]
    method.critic_loss(alone)
    assert method.student.passes > before


# ---- 7 and 8 ----------------------------------------------------------------------------


def test_7_hinge_values():
    real, fake = torch.tensor([[0.3]]), torch.tensor([[-0.4]])
    assert pixel_gan.hinge_critic(real, fake).item() == pytest.approx(1.3)
    assert pixel_gan.hinge_generator(fake).item() == pytest.approx(0.4)
    assert pixel_gan.hinge_critic(torch.tensor([[2.0]]), torch.tensor([[-3.0]])).item() == 0


@pytest.mark.parametrize(("kind", "want"), [("hinge", -0.5), ("softplus", math.log1p(math.e**-1))])
def test_7_the_students_term_and_its_weight(monkeypatch, kind, want):
    engine = flash(monkeypatch, gan=0.5, gan_loss=kind)
    method, batch = engine.method, engine._micro_batches(0)[0]
    method._roles["discriminator"] = lambda x: torch.ones(len(x), 1)
    gan = method.student_loss(batch)["gan"].item()
    assert gan == pytest.approx(want if kind == "hinge" else 0.5 * want)


class Affine(nn.Module):
    """G = m + q eps at one step."""

    def __init__(self, m, q):
        super().__init__()
        self.m, self.q = nn.Parameter(torch.tensor([m])), nn.Parameter(torch.tensor([q]))

    def forward(self, z, t):
        return self.m + self.q * z / bcast(t, z)


@pytest.mark.parametrize("pulled", [False, True])
def test_8_gaussian_fixed_point_and_a_frozen_fake_score_is_wrong(monkeypatch, pulled):
    """The fake score is exact before every update of the student; left behind, it leads astray."""
    net = Affine(1.5, 0.4)
    engine = flash(
        monkeypatch, gaussian((0.0,), 1.0, SMALL), net, student_steps=1, gan=0.0, batch=2048
    )
    method, opt = engine.method, torch.optim.Adam(net.parameters(), lr=0.02)
    fake = method.fake_score.net
    for step in range(300):
        if not pulled or step == 0:
            with torch.no_grad():
                fake.mean.copy_(net.m)
                fake.std.copy_(net.q.abs())
        torch.manual_seed(step)
        opt.zero_grad()
        method.student_loss(engine._micro_batches(0)[0])["matching"].backward()
        opt.step()
    found = net.m.item(), net.q.abs().item()
    if pulled:
        assert abs(found[0]) > 0.3
    else:
        assert found == pytest.approx((0.0, 1.0), abs=0.06)


def test_8_a_pull_of_nothing_is_no_pull_bit_for_bit(monkeypatch):
    weights = []
    for options, off in (({"pull": 1.0}, False), ({"pull": 1.0}, True), ({"pull": 0.97}, False)):
        with monkeypatch.context() as patch:
            if off:
                patch.setattr(flash_dmd, "ema_pull", lambda *a: None)
            engine = flash(patch, steps=12, gan=0.0, **options)
            engine.fit()
        weights.append([p.detach().clone() for r in engine.roles.values() for p in r.params])
    same = [[torch.equal(a, b) for a, b in zip(weights[0], w, strict=True)] for w in weights]
    assert all(same[1]) and not all(same[2])


# ---- it learns --------------------------------------------------------------------------


def test_distils_a_gaussian_in_four_steps(monkeypatch):
    teacher = gaussian((1.0, -0.5), 0.4, SMALL)
    engine = run_method("flash_dmd", teacher, steps=500, batch_size=256, gan=0.0)
    x = student_samples(engine, 20_000)
    assert x.mean(0).tolist() == pytest.approx([1.0, -0.5], abs=0.06)
    assert x.std(0).tolist() == pytest.approx([0.4, 0.4], abs=0.12)


@pytest.mark.parametrize("swapped", [False, True])
def test_joint_rl_raises_the_reward_and_wrong_preferences_lower_it(monkeypatch, up, swapped):
    choose = preference.best_and_worst
    if swapped:
        wrong = lambda *a: (lambda w, l, k: (l, w, k))(*choose(*a))  # noqa: E731, E741
        monkeypatch.setattr(preference, "best_and_worst", wrong)
    engine = flash(
        monkeypatch, gaussian((0.0,), 0.4, SMALL), steps=150, batch=256, gan=0.0, rl_start=0,
        reward=up, ttur=1, lr=3e-3,
    )  # fmt: skip
    engine.stream.prompts = [None] * 64
    logs = engine.train_step() | engine.train_step()
    assert {"rl/beta_h", "rl/reward", "rl/pairs"} <= set(logs)
    engine.fit()
    moved = student_samples(engine, 20_000).mean().item()
    assert (moved < -0.1) if swapped else (moved > 0.1)


def test_unregularised_rl_is_wrong_and_runs_further_away(monkeypatch, up):
    """The distillation that goes on is what holds the student near the teacher."""
    moved = []
    for ratio in (5, 10**6):
        engine = flash(
            monkeypatch, gaussian((0.0,), 0.4, SMALL), steps=120, batch=256, gan=0.0, rl_start=1,
            reward=up, ttur=1, lr=1e-2, rl_ratio=min(ratio, 300),
        )  # fmt: skip
        engine.stream.prompts = [None] * 64
        engine.fit()
        moved.append(student_samples(engine, 5000).mean().item())
    assert moved[1] > 1.3 * moved[0] > 0


def test_preferences_are_learned_at_steps_with_a_successor_only(monkeypatch, up):
    engine = flash(monkeypatch, student=PerStep(), gan=0.0, rl_start=0, reward=up)
    engine.stream.prompts = [None] * 64
    moved = set()
    for seed in range(12):
        batch = engine._micro_batches(0)[0]
        batch.shared.manual_seed(seed)
        loss = engine.method.rl_loss(batch)["preference"]
        (grad,) = torch.autograd.grad(loss, [engine.method.student.net.gain])
        moved |= {i for i in range(4) if grad[i] != 0}
    assert moved == {0, 1}


def test_equal_rewards_teach_nothing(monkeypatch, tmp_path):
    (tmp_path / "same.py").write_text("def same(x, t, prompts):\n    return 0 * x[:, 0]\n")
    engine = flash(monkeypatch, gan=0.0, rl_start=0, reward=f"{tmp_path}/same.py:same")
    engine.stream.prompts = [None] * 64
    losses = engine.method.rl_loss(engine._micro_batches(0)[0])
    assert losses["preference"].item() == 0 == losses["_pairs"].item()


def test_a_reward_that_does_not_fit_is_refused_in_the_first_step(monkeypatch, tmp_path):
    (tmp_path / "odd.py").write_text("def odd(x, t, prompts):\n    return x.repeat(1, 2)\n")
    engine = flash(monkeypatch, steps=9, rl_start=7, reward=f"{tmp_path}/odd.py:odd")
    engine.stream.prompts = [None] * 64
    with pytest.raises(ValueError, match=r"gives \(16, 2\) for 16 samples"):
        engine.train_step()


def test_trying_the_reward_changes_nothing(monkeypatch, up):
    found = []
    for trying in (True, False):
        if not trying:
            monkeypatch.setattr(flash_dmd, "rewards_of_samples", lambda *args: None)
        torch.manual_seed(0)
        engine = flash(monkeypatch, steps=3, rl_start=7, reward=up)
        engine.stream.prompts = [None] * 64
        engine.fit()
        found.append([*engine.method.student.parameters(), *engine.method.fake_score.parameters()])
    assert all(map(torch.equal, *found))


# ---- the discriminator of images --------------------------------------------------------


class Doubling(nn.Module):
    """An encoder with a size, a parameter and a dropout that would show in train mode."""

    size = 16

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5)

    def forward(self, x):
        assert x.shape[1:] == (3, 16, 16)
        first = self.drop(self.conv(x))
        return [first, first[:, :, ::4, ::4]]


def test_only_the_heads_train_and_gradients_reach_the_image():
    critic = pixel_gan.PixelGan(Doubling(), (1, 8, 8), 32).train()
    assert critic.heads.training and not critic.encoder.training and len(critic.heads) == 2
    frozen = {n for n, p in critic.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.conv.weight", "encoder.conv.bias"}
    assert critic.trainable_names == {n for n, p in critic.named_parameters() if p.requires_grad}
    image = torch.randn(2, 1, 8, 8, requires_grad=True)
    logits = critic(image)
    assert logits.shape == (2, 1)
    pixel_gan.hinge_generator(logits).backward()
    assert image.grad.abs().max() > 0 and critic.encoder.conv.weight.grad is None


def test_an_encoder_without_a_graph_is_wrong_and_blocks_the_student():
    critic = pixel_gan.PixelGan(Doubling(), (1, 8, 8), 32)
    seeing = critic.encoder.forward
    critic.encoder.forward = torch.no_grad()(seeing)
    image = torch.randn(2, 1, 8, 8, requires_grad=True)
    assert critic(image).requires_grad  # the heads'
    (grad,) = torch.autograd.grad(critic(image).sum(), image, allow_unused=True)
    assert grad is None


def test_images_are_normalised_as_imagenet():
    critic = pixel_gan.PixelGan(pixel_gan.Plain(), (3, 8, 8), 32)
    (seen,) = critic.features(torch.full((1, 3, 8, 8), -1.0))
    want = [-m / s for m, s in zip(pixel_gan.MEAN, pixel_gan.STD, strict=True)]
    assert seen[0, :, 0, 0].tolist() == pytest.approx(want)


def test_heads_are_those_of_adm():
    kinds = [type(m).__name__ for m in pixel_gan.Head(8, 64, 256)]
    block = ["Conv2d", "GroupNorm", "SiLU"]
    assert kinds == [*block * 4, "AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert pixel_gan.Head(8, 64, 256)[1].num_groups == 32
    for size in (1, 3, 7):  # small maps take fewer strides
        assert pixel_gan.Head(8, size, 32)(torch.randn(2, 8, size, size)).shape == (2, 1)


def test_sam_from_a_local_folder(tmp_path):
    from transformers import SamVisionConfig, SamVisionModel

    tiny = SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=8, num_attention_heads=2,
        image_size=32, patch_size=8, mlp_dim=16, window_size=2, global_attn_indexes=[1, 7],
        num_pos_feats=4,
    )  # fmt: skip
    SamVisionModel(tiny).save_pretrained(tmp_path)
    encoder = pixel_gan.build_encoder(f"sam:{tmp_path}")
    assert encoder.layers == [1, 3, 5, 7] and encoder.size == 32
    critic = pixel_gan.PixelGan(encoder, (1, 8, 8), 32)
    assert len(critic.heads) == 4
    image = torch.randn(2, 1, 8, 8, requires_grad=True)
    critic(image).sum().backward()
    assert image.grad.abs().max() > 0
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match=r"nowhere holds no SAM.*375 MB.*method.encoder=sam:"):
        pixel_gan.build_encoder(f"sam:{tmp_path}/nowhere")


def test_a_crop_is_decoded_for_real_and_fake_alike():
    teacher = tiny_denoiser(SMALL, "x0")
    teacher.decode = lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    x = torch.arange(64.0).view(1, 1, 8, 8)
    corners = {pixel_gan.to_pixels(teacher, x, 4)[0, 0, 0, 0].item() for _ in range(60)}
    assert len(corners) > 10 and all(c % 8 <= 4 and c // 8 <= 4 for c in corners)
    assert pixel_gan.to_pixels(teacher, x, 4).shape == (1, 1, 8, 8)
    assert pixel_gan.to_pixels(teacher, x, 0).shape == (1, 1, 16, 16)
    labels = torch.arange(64) % 3
    engine = run_method(
        "flash_dmd", teacher, steps=1, batch_size=4, x=torch.randn(64, 1, 8, 8), train=False,
        cond={"label": lambda i: labels[i]}, crop=4, gan_width=32,
    )  # fmt: skip
    seen, critic = [], engine.method.discriminator
    critic.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    engine.train_step()
    assert seen == [(4, 1, 8, 8)] * 3  # student's image; real and fake
    with pytest.raises(ValueError, match=r"samples of shape \(1,\). Set method.gan=0"):
        pixel_gan.pixel_gan(gaussian((0.0,), 1.0), "pixels", 32, 0)


# ---- rewards ----------------------------------------------------------------------------


def test_records_follow_from_captions():
    for i in range(1200):
        scene = shapes.scene(i)
        assert shapes.record_of(scene.caption) == scene.record
    for odd in ("a photo of a dog", "a photo of two circle", "a red star"):
        with pytest.raises(ValueError, match="no caption of the shapes world"):
            shapes.record_of(odd)


def test_rewards_of_the_shapes_world():
    scenes = [shapes.scene(i) for i in range(60)]
    x, right = shapes.render(scenes).float() / 255, [s.caption for s in scenes]
    t, wrong = torch.zeros(60), [*right[1:], right[0]]
    verdict, clip = load_reward("shapes_verdict"), load_reward("shapes_clip")
    assert verdict(x, t, right).mean() >= 0.98 and verdict(x, t, wrong).mean() <= 0.2
    assert (clip(x, t, right) > clip(x, t, wrong)).float().mean() > 0.9

    from diffdistill.eval.clip import cosines
    from diffdistill.eval.features import ShapesClip

    judge = ShapesClip()
    want = cosines(judge.features(shapes.render(scenes)), judge.text(right))
    assert clip(x, t, right).tolist() == pytest.approx(want.tolist(), abs=1e-5)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(clip(x, t, right).sum(), x)
    assert grad.abs().max() > 0 and not verdict(x, t, right).requires_grad
    with pytest.raises(ValueError, match="32 x 32 RGB images"):
        clip(torch.zeros(1, 1, 28, 28), t[:1], right[:1])


@pytest.mark.parametrize(
    ("needs", "want"),
    [("pixels", [1.0, 0.0]), ("latents", [4.0, -4.0]), ("noisy_latents", [2, -2])],
)
def test_a_reward_gets_what_it_declares(tmp_path, needs, want):
    teacher = gaussian((0.0,), 1.0, SMALL)
    teacher.decode = lambda x: 3 * x
    seen = {}

    def score(x, t, prompts):
        seen.update(t=t.tolist(), prompts=list(prompts))
        return x[:, 0]

    z = torch.tensor([[2.0], [-2.0]])
    double = lambda z, t, cond: 2 * z  # noqa: E731
    found = rewards_of(Reward("mine", score, needs), double, teacher, z, 0.5, {}, ["a", "b"])
    assert found.tolist() == want and seen == {"t": [0.5, 0.5], "prompts": ["a", "b"]}


def test_any_callable_is_a_reward(tmp_path, monkeypatch):
    code = (
        "def plain(x, t, prompts):\n    return [len(p) for p in prompts]\n"
        "def noisy(x, t, prompts):\n    return x.mean(1)\n"
        "noisy.needs, noisy.differentiable = 'noisy_latents', True\n"
        "def odd(x, t, prompts):\n    return x\n"
        "def wrong(x, t, prompts): ...\nwrong.needs = 'sound'\n"
    )
    (tmp_path / "my_reward_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for where in ("my_reward_module", f"{tmp_path}/my_reward_module.py"):
        plain, noisy = load_reward(f"{where}:plain"), load_reward(f"{where}:noisy")
        x = torch.ones(2, 3, requires_grad=True)
        assert plain(x, x, ["ab", "c"]).tolist() == [2.0, 1.0] and plain.needs == "pixels"
        assert noisy.needs == "noisy_latents" and noisy(x, x, []).requires_grad
        with pytest.raises(ValueError, match=r"gives \(2, 3\) for 2 samples"):
            load_reward(f"{where}:odd")(x, x, [])
        with pytest.raises(ValueError, match="needs='sound'"):
            load_reward(f"{where}:wrong")
        with pytest.raises(ValueError, match="has no function 'none'"):
            load_reward(f"{where}:none")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shape_clip", "one of: shapes_clip, shapes_verdict"),
        ("", "reward '' is unknown"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("nowhere.py:f", "is no function"),
    ],
)
def test_unknown_rewards_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        flash_dmd.Config(rl_start=5, reward=name).validate()


def test_prompts_travel_with_their_rows():
    rows = torch.arange(20)
    given = [f"prompt {i}" for i in range(20)]
    stream = TensorStream(20, (1,), {"id": lambda i: rows[i]}, prompts=given)
    batch = stream.batch(3, 0, range(4), 8)
    assert batch.prompts == [f"prompt {i}" for i in batch.cond["id"].tolist()]
    assert TensorStream(20, (1,), {}).batch(0, 0, range(4), 4).prompts is None


# ---- options ----------------------------------------------------------------------------


def test_needs_and_roles_follow_the_options(monkeypatch, up):
    needs = flash_dmd.FlashDMD.needs
    assert needs(flash_dmd.Config()).images and not needs(flash_dmd.Config()).prompts
    assert not needs(flash_dmd.Config(gan=0.0)).images
    assert needs(flash_dmd.Config(rl_start=0, reward=up)).prompts
    assert set(flash(monkeypatch, gan=0.0).roles) == {"student", "fake_score"}
    assert [flash_dmd.Config(student_steps=k, gan=0.0).high for k in (1, 2, 3, 4)] == [1, 1, 1, 2]


def test_the_teacher_is_guided_and_the_fake_score_is_not():
    engine = run_method(
        "flash_dmd", shifted(SMALL), steps=1,
        batch_size=4, cond={"shift": lambda i: torch.ones(len(i), 1)}, train=False, gan=0.0,
        guidance=3.0,
    )  # fmt: skip
    losses = engine.method.student_loss(engine._micro_batches(0)[0])
    assert losses["_gap"].item() == pytest.approx(2.0)  # |1 - 3|; both guided: 0


def test_matching_times_may_be_the_noisier_half(monkeypatch):
    seen, draw = [], flash_dmd.uniform_times
    monkeypatch.setattr(
        flash_dmd, "uniform_times", lambda s, x, *a: seen.append(a) or draw(s, x, *a)
    )
    engine = flash(monkeypatch, gan=0.0, t_low=0.5, t_high=0.9)
    engine.train_step()
    assert seen == [(0.5, 0.9), ()]  # the fake score learns all times


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"high_steps": 4}, "fewer noisier steps than steps"),
        ({"student_steps": 1}, "no low-noise step for the GAN"),
        ({"student_steps": 1, "gan": 0.0, "rl_start": 0}, "none to learn from preferences"),
        ({"pull": 1.5}, "method.pull=1.5"),
        ({"gan_width": 40}, "a multiple of 32"),
        ({"rl_start": 0, "candidates": 1}, "method.candidates=1"),
        ({"rl_start": 0, "rl_ratio": 0}, "method.rl_ratio=0"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low < t_high"),
    ],
)
def test_options_that_contradict_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        flash_dmd.Config(**options).validate()


def test_the_recipe_trains_with_everything_on(tmp_path):
    small = [
        "train.steps=3", "train.batch_size=4", "data.size=12", "precision.dtype=fp32",
        "precision.attention=default", "precision.channels_last=off", "threads=1",
        "method.rl_start=0", "method.ttur=1", "method.rl_ratio=1", "method.reward=shapes_verdict",
        "method.threshold=-1", "lora.student=2", f"run.root={tmp_path}",
    ]  # fmt: skip
    cfg, _ = config.compose(["recipe=flash_dmd_shapes", *small])
    needs = flash_dmd.FlashDMD.needs(cfg.method)
    teacher = load_teacher("shapes-sd")
    engine = run.build(cfg, flash_dmd.FlashDMD, needs, teacher, tmp_path, Accelerator(cpu=True))
    captions = {shapes.scene(i).caption for i in range(12)}
    assert set(engine._micro_batches(0)[0].prompts) <= captions
    logs = [engine.train_step() for _ in range(3)]
    assert "student/gan" in logs[0] and "rl/preference" in logs[1]
    assert all(v.isfinite() for log in logs for v in log.values())
    assert 0 <= logs[1]["rl/reward"] <= 1


def test_the_cost_of_a_run_is_known_before_it(tmp_path):
    """Turns of the student, and samples that the critics need not draw again, count as they are."""
    more = [
        "train.batch_size=2",
        "data.size=8",
        "precision.dtype=fp32",
        "method.reward=shapes_clip",
    ]
    more += ["method.rl_start=2", "method.rl_ratio=1", "precision.attention=default", "threads=1"]
    cfg, _ = config.compose(["recipe=flash_dmd_shapes", "precision.channels_last=off", *more])
    counter = passes.Counter(
        passes.dry_engine(cfg, load_teacher("shapes-sd"), Accelerator(cpu=True))
    )
    engine = passes.dry_engine(cfg, load_teacher("shapes-sd"), Accelerator(cpu=True))
    for step in range(6):
        before = engine.passes
        engine.train_step()
        assert counter.step(step, cfg.train.seed) == engine.passes - before, step


def test_a_reward_leaves_the_noise_of_training_alone():
    """It may build its judge at its first call, which a resumed run does at another step."""
    from diffdistill.parts.reward import Reward

    def score(x, t, prompts):
        return torch.nn.Linear(3, 1)(x)[:, 0]

    torch.manual_seed(0)
    Reward("late", score)(torch.zeros(2, 3), torch.zeros(2), [None] * 2)
    drawn = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(3))
