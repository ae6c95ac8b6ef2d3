"""The derivative of whole networks: diffusers' own, the three modes, the guard."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.denoiser import Denoiser, Runtime
from diffdistill.kernels import check_tangent, chunked, student_jvp, use_jvp_attention
from diffdistill.schedules import EDM
from diffdistill.testing import TinyConvNet

B = 2
Case = tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], float, int]


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def text(tokens: int, width: int) -> Tensor:
    return torch.randn(B, tokens, width, dtype=torch.float64)


# ---- networks of diffusers: (fn, shape of a sample, factor of its time, attention layers) ----


def unet() -> Case:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).double()  # fmt: skip
    words, mask = text(5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    fn = lambda x, t: net(x, t, words, encoder_attention_mask=mask).sample  # noqa: E731
    return fn, (4, 8, 8), 1, 8


def sd3() -> Case:
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=6, out_channels=4, qk_norm="rms_norm",
    ).double()  # fmt: skip
    words, pooled = text(5, 12), text(1, 6)[:, 0]
    fn = lambda x, t: net(x, words, pooled, t).sample  # noqa: E731
    return fn, (4, 8, 8), 1, 2


def pixart() -> Case:
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12,
        use_additional_conditions=False,
    ).double()  # fmt: skip
    words, mask = text(5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def fn(x, t):
        more = {"resolution": None, "aspect_ratio": None}
        return net(x, words, t, added_cond_kwargs=more, encoder_attention_mask=mask).sample

    return fn, (4, 8, 8), 1, 4


def flux() -> Case:
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 8),
    ).double()  # fmt: skip
    words, pooled = text(5, 8), text(1, 6)[:, 0]
    at = torch.zeros(16, 3)
    at[:, 1], at[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    fn = lambda x, t: net(  # noqa: E731
        x, encoder_hidden_states=words, pooled_projections=pooled, timestep=t, img_ids=at,
        txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip
    return fn, (16, 4), 1000, 2


def qwen() -> Case:
    from diffusers import QwenImageTransformer2DModel

    net = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    ).double()  # fmt: skip
    words, mask = text(5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    fn = lambda x, t: net(  # noqa: E731
        x, encoder_hidden_states=words, encoder_hidden_states_mask=mask, timestep=t,
        img_shapes=[[(1, 4, 4)]] * B,
    ).sample  # fmt: skip
    return fn, (16, 16), 1000, 2


def wan() -> Case:
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).double()  # fmt: skip
    words = text(5, 8)
    fn = lambda x, t: net(x, t, words).sample  # noqa: E731
    return fn, (4, 3, 4, 4), 1, 4


NETWORKS = [unet, sd3, pixart, flux, qwen, wan]


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_diffusers_networks(make, monkeypatch):
    """Equal to torch.func.jvp on math attention, and to differences; one run per layer."""
    runs, forward = [], chunked.forward
    monkeypatch.setattr(chunked, "forward", lambda *a: runs.append(a[4]) or forward(*a))
    fn, shape, factor, layers = make()
    x, tx = torch.randn(2, B, *shape, dtype=torch.float64)
    t, tt = torch.tensor([60.0, 33.0]).double() / factor, torch.ones(B).double() / factor
    out, tangent = student_jvp(fn, (x, t), (tx, tt))
    assert len(runs) == layers
    if make in (unet, pixart):  # cross-attention onto the text
        assert [tk is None for tk in runs].count(True) == layers // 2
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        want_out, want = torch.func.jvp(fn, (x, t), (tx, tt))
    assert (out - want_out).abs().max() < 1e-10 and (tangent - want).abs().max() < 1e-10
    assert tangent.norm() > 1e-3 and not tangent.requires_grad
    errors = check_tangent(fn, (x, t), (tx, tt), steps=(1e-3, 2**-5))
    assert len(errors) == 2 and max(errors) < 1e-3


def test_gradients_of_a_diffusers_network():
    """The value that comes with the tangent has the gradients of an ordinary pass."""
    torch.manual_seed(1)
    fn, shape, *_ = sd3()
    net = fn.__closure__[0].cell_contents  # type: ignore[index]
    x, tx = torch.randn(2, B, *shape, dtype=torch.float64)
    t = torch.tensor([60.0, 33.0]).double()
    grads = []
    for context, call in (
        (use_jvp_attention(), lambda: torch.func.jvp(lambda x: fn(x, t), (x,), (tx,))[0]),
        (sdpa_kernel(SDPBackend.MATH), lambda: fn(x, t)),
    ):
        with context:
            out = call()
        leaves = [p for p in net.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(out.square().mean(), leaves, allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-12 + 1e-9 * b.abs().max()


# ---- the three modes --------------------------------------------------------------------


def student(x: Tensor, t: Tensor) -> Tensor:
    """F = 0.8 x + 0.25 sin 3 t: the student of the specifications of sCM and rCM."""
    return 0.8 * x + 0.25 * torch.sin(3 * t)[:, None]


def rcm_point(dtype=torch.float64) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """x = 0.9, t = 1 and the tangents (cos t sin t F_T, cos t sin t) with F_T = -.05141187."""
    x, t = torch.full((1, 1), 0.9, dtype=dtype), torch.ones(1, dtype=dtype)
    speed = t.cos() * t.sin()
    return (x, t), (speed[:, None] * -0.05141187, speed)


def check_rcm(jvp: Callable) -> None:
    primals, tangents = rcm_point()
    out, exact = jvp(student, primals, tangents)
    assert abs(float(out) - 0.75528) < 1e-6
    assert abs(float(exact) - -0.35627358) < 1e-8
    for h, want in ((1e-2, -0.35722377), (1e-4, -0.35628353)):
        assert abs(float(jvp(student, primals, tangents, "semi", step=h)[1]) - want) < 1e-8
    assert abs(float(jvp(student, primals, tangents, "fd", step=1e-3)[1]) - -0.35627358) < 1e-6


def test_known_answers_of_the_modes():
    check_rcm(student_jvp)


def test_known_answers_of_the_modes_wrong():
    """The time tangent dropped; the state's doubled by a difference that is not halved."""

    def no_time(fn, primals, tangents, *args, **kwargs):
        return student_jvp(fn, primals, (tangents[0], None), *args, **kwargs)

    def twice(fn, primals, tangents, mode="exact", **kwargs):
        out, tangent = student_jvp(fn, primals, tangents, mode, **kwargs)
        return out, tangent * (2 if mode == "fd" else 1)

    for wrong in (no_time, twice):
        with pytest.raises(AssertionError):
            check_rcm(wrong)


def net_of(frequency: float = 1.0, dropout: float = 0.0, dtype=torch.float32):
    """Attention over 6 tokens, with sin and cos of the time."""
    torch.manual_seed(0)
    maps = nn.ModuleList([nn.Linear(16, 16) for _ in range(5)]).to(dtype)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        waves = frequency * t[:, None] * torch.linspace(0.1, 1, 8, dtype=x.dtype)
        h = F.silu(maps[0](x) + torch.cat([waves.sin(), waves.cos()], -1)[:, None])
        q, k, v = (m(h).unflatten(-1, (2, 8)).transpose(1, 2) for m in maps[1:4])
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return maps[4](F.dropout(h, dropout))

    return fn


def given(dtype=torch.float32):
    torch.manual_seed(3)
    x, tx = torch.randn(2, 4, 6, 16, dtype=dtype)
    return (x, torch.linspace(0.2, 0.9, 4, dtype=dtype)), (tx, torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("frequency, bar", [(1, 1e-3), (1000, 1e-2)])
def test_differences_in_fp32_choose_their_step_by_the_frequency(frequency, bar):
    primals, tangents = given()
    fn = net_of(frequency)
    _, exact = student_jvp(fn, primals, tangents)
    _, measured = student_jvp(fn, primals, tangents, "fd", frequency=frequency)
    assert off(measured, exact) < bar
    if frequency == 1000:  # wrong: the step of a slow embedding
        assert off(student_jvp(fn, primals, tangents, "fd")[1], exact) > 0.1
    _, semi = student_jvp(fn, primals, tangents, "semi")
    assert off(semi, exact) < (1e-2 if frequency == 1 else 0.2)


def test_differences_stay_in_the_domain():
    """Times at both ends, and near a second time r: f = t^2 is exact for three points."""
    seen = []

    def fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.clone())
        return x * 0 + t[:, None] ** 2

    t = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    low = torch.tensor([0.0, 0.3, 0.0, 0.0], dtype=torch.float64)
    x, still = torch.zeros(4, 1, dtype=torch.float64), None
    for mode, bar in (("fd", 1e-9), ("semi", 2e-2)):
        seen.clear()
        _, slope = student_jvp(
            fn, (x, t), (still, torch.ones_like(t)), mode, step=1e-2, domain=(low, 1.0)
        )
        assert all(((s >= low) & (s <= 1)).all() for s in seen)
        assert (slope[:, 0] - 2 * t).abs().max() < bar
    seen.clear()
    student_jvp(fn, (x, t), (still, torch.ones_like(t)), "fd", step=1e-2)
    assert any((s > 1).any() for s in seen), "wrong: without a domain they leave it"


def test_several_times():
    """A flow map u(z, t, r) with tangent (v, 1, None): r does not move."""
    u = lambda z, t, r: 0.4 * z - 0.2 * t[:, None] ** 2 + 0.1 * r[:, None] * z  # noqa: E731
    z, t, r = torch.full((1, 1), 0.9), torch.tensor([0.8]), torch.tensor([0.2])
    want = (0.4 + 0.1 * 0.2) * 0.5 - 0.4 * 0.8
    for mode in ("exact", "fd", "semi"):
        moved = (torch.full((1, 1), 0.5), torch.ones(1), None)
        _, tangent = student_jvp(u, (z, t, r), moved, mode)
        assert abs(float(tangent) - want) < 2e-3, mode


@pytest.mark.parametrize("mode", ["exact", "fd", "semi"])
def test_every_pass_sees_the_same_dropout(mode):
    primals, tangents = given(torch.float64)
    fn = net_of(dropout=0.5, dtype=torch.float64)
    torch.manual_seed(5)
    out, tangent = student_jvp(fn, primals, tangents, mode)
    again = fn(*primals)  # the pass with gradients
    assert torch.allclose(out, again, atol=1e-12) and again.requires_grad
    torch.manual_seed(5)
    _, exact = student_jvp(fn, primals, tangents)
    assert off(tangent, exact) < 2e-4
    assert off(student_jvp(fn, primals, tangents, mode)[1], exact) < 2e-4
    fn(*primals)
    other = student_jvp(fn, primals, tangents, mode)[1]
    assert off(other, exact) > 0.1, "wrong: other masks give another derivative"


# ---- precision --------------------------------------------------------------------------


def test_fp32_holds_where_a_denoiser_has_a_bf16_runtime():
    torch.manual_seed(0)
    exact = Denoiser(TinyConvNet(), EDM(), "eps", shape=(1, 8, 8))
    half = exact.clone(exact.net)
    half.runtime = Runtime(dtype="bf16")
    x, tx = torch.randn(2, 3, 1, 8, 8)
    t, label = torch.full((3,), 0.7).double(), {"label": torch.tensor([0, 1, 2])}
    for mode in ("exact", "fd"):
        runs = [
            student_jvp(lambda x, t, d=d: d(x, t, label), (x, t), (tx, torch.ones_like(t)), mode)
            for d in (exact, half)
        ]
        assert torch.equal(runs[0][1], runs[1][1])
    moved = (tx, torch.ones_like(t))
    _, rounded = student_jvp(lambda x, t: half(x, t, label), (x, t), moved, precision="bf16")
    assert 1e-4 < off(rounded, runs[0][1]) < 0.1


def test_tf32_is_off_for_differences_only():
    seen = []

    def fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return x * t[:, None]

    x, t = torch.ones(1, 1), torch.ones(1)
    before = torch.backends.cudnn.allow_tf32
    for mode in ("exact", "fd", "semi"):
        student_jvp(fn, (x, t), (x, t), mode)
    assert seen == [before, False, False, False, False, False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_refused():
    x, t = torch.ones(2, 3), torch.ones(2)
    long = torch.ones(2, dtype=torch.long)
    half = nn.Linear(3, 3).bfloat16()
    refused = [
        (((x, t), (x, t), "central"), "Allowed: exact, fd, semi"),
        (((x, t), (x, t), "exact", "fp8"), "Allowed: fp32, bf16, fp16"),
        (((x, t), (x, t), "fd", "bf16"), "differences need fp32"),
        (((x, t), (x,)), "2 primals and 1 tangents"),
        (((x, t), (None, None)), "at least one that moves"),
        (((x, t), (x, t.double())), "primal 1 is torch.float32"),
        (((x, t), (x[:1], t)), r"primal 0 .* \[1, 3\]. They must be alike"),
        (((x, long), (x, long)), "Give a floating dtype, times included"),
        (((x, t), (x, t), "exact", "fp32", half), "computes in torch.bfloat16"),
    ]
    for (primals, tangents, *rest), words in refused:
        fn = lambda x, t, rest=rest: rest[2](x.bfloat16()) if len(rest) > 2 else x  # noqa: E731
        with pytest.raises(ValueError, match=words):
            student_jvp(fn, primals, tangents, *rest[:2])


# ---- 7: the guard -----------------------------------------------------------------------


@torch.library.custom_op("diffdistill_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """What third-party kernels look like to torch."""
    return x * 2


def test_7_guard_passes_a_sound_network():
    for dtype, bar in ((torch.float64, 1e-3), (torch.float32, 2e-2)):
        primals, tangents = given(dtype)
        assert max(check_tangent(net_of(dtype=dtype), primals, tangents)) < bar
    assert len(check_tangent(net_of(), *given()[:1], (given()[1][0], None))) == 1


def test_7_guard_sees_a_wrong_zero():
    """One custom operator on the only path; and one beside sound layers."""
    primals, tangents = given(torch.float64)
    fn = net_of(dtype=torch.float64)
    _, silent = student_jvp(lambda x, t: opaque(fn(x, t)), primals, tangents)
    assert (silent == 0).all()  # no error: this is what the guard is for
    for broken in (lambda x, t: opaque(fn(x, t)), lambda x, t: fn(x, t) + 0.02 * opaque(x)):
        with pytest.raises(ValueError, match=r"primal 0 is wrong.*custom operators"):
            check_tangent(broken, primals, tangents)
    with pytest.raises(ValueError, match="primal 1 is wrong"):
        check_tangent(lambda x, t: fn(x, t.detach()) + opaque(t)[:, None, None], primals, tangents)
    with pytest.raises(ValueError, match="does not move along primal 1"):
        check_tangent(lambda x, t: fn(x, t * 0), primals, tangents)


def test_7_guard_sees_nan():
    primals, tangents = given()
    with pytest.raises(ValueError, match="is wrong"):
        check_tangent(lambda x, t: x * math.nan, primals, tangents)


def test_7_guard_finds_its_step_for_fast_embeddings():
    x, t = torch.randn(4, 3), torch.rand(4)
    along = torch.randn(4, 3), torch.ones(4)
    for speed in (30.0, 300.0):  # nobody has to say it
        assert (
            max(check_tangent(lambda x, t, w=speed: x * (w * t)[:, None].sin(), (x, t), along))
            < 2e-2
        )
    half = lambda x, t: x * ((300 * t).sin() + 0.2 * opaque((300 * t).cos()))[:, None]  # noqa: E731
    with pytest.raises(ValueError, match=r"primal [01] is wrong"):
        check_tangent(half, (x, t), along)
