"""Every teacher looks the same from outside: x0, guidance, schedules, features, copies."""

import pytest
import torch

from diffdistill.denoiser import Denoiser, Runtime, eps_of, guided, on_schedule, score_of
from diffdistill.schedules import DDPM, EDM, RectifiedFlow, TrigFlow, add_noise
from diffdistill.testing import GaussianNet, PredictionNet, gaussian, tiny_denoiser

BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
SCHEDULES = {
    "edm": EDM(), "ddpm": DDPM(BAR), "flow": RectifiedFlow(), "trig": TrigFlow(t_max=1.57),
}  # fmt: skip
MEAN, STD = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.4, 1.0, 2.0])


def inside(schedule, n: int = 64) -> torch.Tensor:
    """Times away from both ends, where every prediction type is well conditioned."""
    share = torch.linspace(0.05, 0.9, n, dtype=torch.float64)
    return schedule.t_min + (schedule.t_max - schedule.t_min) * share


def ideal(z, alpha, sigma):
    """E[x0 | z] for N(MEAN, STD^2), in float64."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return (MEAN + gain * (z.double() - alpha * MEAN)).float()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_every_prediction_type_gives_the_same_x0(name, prediction):
    schedule = SCHEDULES[name]
    net = PredictionNet(GaussianNet(MEAN, STD, schedule), schedule, prediction)
    t = inside(schedule)
    z = add_noise(schedule, MEAN + STD * torch.randn(64, 3), torch.randn(64, 3), t)
    x0 = Denoiser(net, schedule, prediction, shape=(3,))(z, t)
    want = ideal(z, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None])
    torch.testing.assert_close(x0, want, rtol=2e-4, atol=2e-4)
    if name != "ddpm":
        return
    # at t = 999 an eps network divides by 0.068: float32 conversion must hold there
    t, z = torch.full((8,), 999.0, dtype=torch.float64), torch.randn(8, 3)
    x0 = Denoiser(net, schedule, prediction, shape=(3,))(z, t)
    want = ideal(z, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None])
    torch.testing.assert_close(x0, want, rtol=1e-3, atol=1e-3)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match=r"'epsilon'. Allowed: x0, eps, v, flow"):
        Denoiser(torch.nn.Identity(), EDM(), "epsilon")


@pytest.mark.parametrize("schedule", ["edm", None, EDM])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=r"schedule is .*Give one of diffdistill.schedules"):
        Denoiser(torch.nn.Identity(), schedule=schedule, prediction="x0", shape=(2,))


def test_conversion_is_float32_under_bf16():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, z, t):
            out = torch.nn.functional.linear(z, torch.eye(2))
            seen.append((out.dtype, t.dtype))
            return out

    denoiser = Denoiser(Net(), DDPM(BAR), "eps", shape=(2,))
    denoiser.runtime = Runtime(dtype="bf16")
    z, t = torch.randn(4, 2), torch.full((4,), 999.0, dtype=torch.float64)
    x0 = denoiser(z, t)
    assert seen == [(torch.bfloat16, torch.float64)] and x0.dtype == torch.float32
    alpha, sigma = (
        f(t)[:, None].float() for f in (denoiser.schedule.alpha, denoiser.schedule.sigma)
    )
    torch.testing.assert_close(x0, (z - sigma * z.bfloat16().float()) / alpha)
    denoiser.prediction = "x0"
    assert denoiser(z, t).dtype == torch.float32


@pytest.mark.parametrize("own", SCHEDULES)
@pytest.mark.parametrize("other", SCHEDULES)
def test_change_of_schedule(own, other):
    teacher, schedule = (
        gaussian((1.0, -0.5, 2.0), (0.4, 1.0, 2.0), SCHEDULES[own]),
        SCHEDULES[other],
    )
    ratio = torch.logspace(-1, 0.7, 32, dtype=torch.float64)  # inside every schedule's range
    t = schedule.t_of_ratio(ratio)
    z = add_noise(schedule, MEAN + STD * torch.randn(32, 3), torch.randn(32, 3), t)
    want = ideal(z, schedule.alpha(t)[:, None], schedule.sigma(t)[:, None])
    torch.testing.assert_close(on_schedule(teacher, schedule)(z, t, {}), want, rtol=1e-5, atol=1e-5)


def test_noise_and_score_of_an_estimate():
    schedule, t = TrigFlow(), torch.tensor([0.4, 1.1], dtype=torch.float64)
    x, eps = torch.randn(2, 3), torch.randn(2, 3)
    z = add_noise(schedule, x, eps, t)
    torch.testing.assert_close(eps_of(schedule, x, z, t), eps, rtol=1e-4, atol=1e-5)
    # the score of N(0, 1) under a variance-preserving schedule is -z
    x0 = gaussian((0.0, 0.0, 0.0), 1.0, schedule)(z, t)
    torch.testing.assert_close(score_of(schedule, x0, z, t), -z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "weight"),
    [("x0", 1.0), ("eps", (0.6 / 0.8) ** 2), ("v", (1 / 0.8) ** 2), ("flow", (1.4 / 0.8) ** 2)],
)
def test_loss_weight_is_the_unit_loss_of_the_output(prediction, weight):
    t = torch.asin(torch.tensor([0.8], dtype=torch.float64))  # alpha 0.6, sigma 0.8
    denoiser = Denoiser(torch.nn.Identity(), TrigFlow(), prediction)
    assert denoiser.loss_weight(t).item() == pytest.approx(weight)
    a, b, z = torch.randn(1, 5), torch.randn(1, 5), torch.randn(1, 5)
    gap = denoiser.to_x0(a, z, t) - denoiser.to_x0(b, z, t)
    torch.testing.assert_close(weight * gap.square(), (a - b).square(), rtol=1e-4, atol=1e-6)


def test_loss_weight_of_edm():
    denoiser = Denoiser(torch.nn.Identity(), EDM(), sigma_data=0.5)
    assert denoiser.loss_weight(torch.tensor([2.0])).item() == pytest.approx(0.25 + 4)


class LabelNet(torch.nn.Module):
    def forward(self, z, t, label):
        return z * 0 + label.view(-1, 1).float()


def test_guidance_combination():
    denoiser = Denoiser(LabelNet(), EDM(), null_cond={"label": torch.tensor([10])}, shape=(2,))
    z, t, cond = torch.zeros(3, 2), torch.ones(3).double(), {"label": torch.tensor([1, 2, 3])}
    assert guided(denoiser, 1.0) is denoiser  # one pass
    out = guided(denoiser, 3.0)(z, t, cond)  # u + g (c - u)
    assert out[:, 0].tolist() == [10 + 3 * (c - 10) for c in (1, 2, 3)]
    assert denoiser.passes == 6
    assert guided(denoiser, 0.0)(z, t, cond)[:, 0].tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="Set guidance to 1"):
        guided(Denoiser(LabelNet(), EDM()), 2.0)


def test_features_stop_early_and_keep_the_gradient():
    denoiser = tiny_denoiser()
    reached = []
    denoiser.net.out.register_forward_hook(lambda *_: reached.append("out"))
    want = []
    hook = denoiser.net.mid.register_forward_hook(lambda _m, _a, out: want.append(out.detach()))
    z = torch.randn(2, 1, 8, 8, requires_grad=True)
    t, cond = torch.ones(2).double(), {"label": torch.tensor([0, 2])}
    denoiser(z, t, cond)
    hook.remove()
    reached.clear()
    feature = denoiser.features(z, t, cond)
    assert reached == [] and feature.shape == (2, 16, 8, 8)
    assert torch.equal(feature, want[0])
    feature.sum().backward()
    assert z.grad.abs().sum() > 0
    assert denoiser.net.inp.weight.grad.abs().sum() > 0
    assert denoiser.net.out.weight.grad is None
    denoiser(z, t, cond)  # the hook is gone
    assert reached == ["out"]
    denoiser.feature_layer = None
    with pytest.raises(ValueError, match="feature_layer"):
        denoiser.features(z, t, cond)


def test_clone_shares_nothing_that_is_trained():
    teacher = tiny_denoiser()
    z, t, cond = torch.randn(2, 1, 8, 8), torch.ones(2).double(), {"label": torch.tensor([0, 1])}
    before = teacher(z, t, cond)
    copy = teacher.clone()
    assert torch.equal(copy(z, t, cond), before)
    storages = [{p.data_ptr() for p in d.parameters()} for d in (teacher, copy)]
    assert len(storages[0]) == len(storages[1]) and not storages[0] & storages[1]
    copy.eval()
    copy.requires_grad_(False)
    copy.runtime = Runtime(dtype="bf16")
    with torch.no_grad():
        for p in copy.parameters():
            p.zero_()
    assert teacher.training and teacher.net.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert teacher.runtime == Runtime()
    assert torch.equal(teacher(z, t, cond), before)
    assert copy.net is not teacher.net and teacher.clone(teacher.net).net is teacher.net


def test_null_condition_has_the_batch_size():
    null = tiny_denoiser().null_cond(torch.zeros(5, 1, 8, 8))
    assert null["label"].tolist() == [3] * 5


def test_math_attention_is_for_passes_that_keep_a_graph():
    runtime, cpu = Runtime(attention="math"), torch.device("cpu")
    with runtime.context(cpu):
        assert not torch.backends.cuda.flash_sdp_enabled()
    with torch.no_grad(), runtime.context(cpu):
        assert torch.backends.cuda.flash_sdp_enabled()
