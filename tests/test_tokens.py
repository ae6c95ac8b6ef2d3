"""Autoregressive networks behind one interface: masks, caches, guidance, tokenizers."""

import pytest
import torch

from diffdistill.parts.autoregressive import multinomial, sample_tokens
from diffdistill.pipelines.vq import VQTokenizer, refiner_of
from diffdistill.testing import tiny_tokens
from diffdistill.tokens import Choice, check_choice, log_probs, nearest

KINDS = ["raster", "scales"]
LABEL = {"label": torch.tensor([3, 1])}


def model(kind, size=8):
    return tiny_tokens(kind, size).model()


def reach(function, x):
    """[n, n] bool: whether output position i depends on input position j."""
    x = x.clone().requires_grad_(True)
    out = function(x)
    rows = [torch.autograd.grad(out[:, i].square().sum(), x, retain_graph=True)[0] for i in
            range(out.shape[1])]  # fmt: skip
    return torch.stack([r.abs().sum((0, 2)) > 0 for r in rows])


# ---- what depends on what ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_see_earlier_groups_only(kind):
    m = model(kind, 12)
    n = m.shape[0]
    seen = reach(lambda q: m.logits(q, LABEL), torch.randn(2, *m.shape))
    assert torch.equal(seen, m.level[:, None] > m.level[None])
    assert n == (9 if kind == "raster" else 1 + 4 + 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_student_sees_itself_and_earlier_groups(kind):
    m = model(kind, 12).variant("jump")
    before = m.level[:, None] > m.level[None]
    seen = reach(lambda x: torch.cat(m.jump(x, 2, LABEL), -1), torch.randn(2, *m.shape))
    assert torch.equal(seen, before | torch.eye(m.shape[0], dtype=torch.bool))


def test_a_jump_student_of_scales_does_not_see_its_scale_and_wrong_block_mask_does():
    m = model("scales", 12).variant("jump")
    level = torch.cat([torch.tensor([-1]), m.level])
    m.net.mask = level[:, None] >= level  # the teacher's
    seen = reach(lambda x: m.jump(x, 0, LABEL)[0], torch.randn(2, *m.shape))
    assert seen[6, 5] and not (m.level[:, None] > m.level[None])[6, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_diffusion_student_reads_noise_like_tokens(kind):
    m = model(kind, 12).variant("diffusion", head_width=16, head_blocks=1)
    seen = reach(lambda x: m.features(x, LABEL), torch.randn(2, *m.shape))
    assert torch.equal(seen, m.level[:, None] > m.level[None])


@pytest.mark.parametrize("kind", KINDS)
def test_variants_keep_the_teachers_weights(kind):
    m = model(kind)
    for other in (m.variant("jump"), m.variant("diffusion")):
        torch.testing.assert_close(other.net.blocks[1].qkv.weight, m.net.blocks[1].qkv.weight)
        torch.testing.assert_close(other.net.label.weight, m.net.label.weight)
        torch.testing.assert_close(other.net.enter.weight, m.net.enter.weight)
    jump = m.variant("jump")
    torch.testing.assert_close(jump.net.output.weight, m.net.output.weight)
    if kind == "scales":  # one level more, in front
        torch.testing.assert_close(jump.net.place[:, 1:], m.net.place)
        torch.testing.assert_close(jump.net.scale.weight[1:], m.net.scale.weight)
    q = torch.randn(2, *m.shape)
    torch.testing.assert_close(m.variant("diffusion").features(q, LABEL), m.features(q, LABEL))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_stands_before_the_teachers_weights_and_is_carried_on(kind):
    m, q = model(kind), torch.randn(2, *model(kind).shape)
    adapted = m.variant("teacher", reader=8)
    torch.testing.assert_close(adapted.net.output.weight, m.net.output.weight)
    assert adapted.net.enter[0].out_features == 8 and not adapted.net.config.indices
    assert (adapted.logits(q, LABEL) - m.logits(q, LABEL)).abs().max() > 1e-3
    student = adapted.variant("diffusion")
    torch.testing.assert_close(student.features(q, LABEL), adapted.features(q, LABEL))


def test_indices_become_the_nearest_linear_map_of_the_codes():
    pipe = tiny_tokens()
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    net = type(pipe.transformer)(**config | {"indices": True})
    book = pipe.tokenizer.codebook.detach()
    with torch.no_grad():
        net.enter.weight.copy_(book @ torch.randn(4, 32) + 0.3)
    pipe.register_modules(transformer=net)
    m = pipe.model()
    student = m.variant("diffusion")
    torch.testing.assert_close(student.net.enter(book), net.enter.weight, atol=1e-4, rtol=1e-4)
    near = book[[3]] + 0.01
    assert torch.equal(m.admissible(near), book[[3]])
    assert torch.equal(model("raster").admissible(near), near)
    tokens = sample_tokens(m, torch.randn(2, 4, 4), LABEL, 1.5)
    assert tokens.shape == (2, 4)


# ---- sampling ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_kept_keys_change_nothing(kind):
    """Tokens drawn group by group are those that the probabilities of one full pass give."""
    m = model(kind, 12)
    eps = torch.randn(2, *m.shape)
    tokens = sample_tokens(m, eps, LABEL, 2.0)
    log_p = log_probs(m.logits(m.vectors(tokens), LABEL, 2.0), m.choice)
    assert torch.equal(multinomial(log_p, eps, m.codebook), tokens)
    middle = len(m.groups) // 2
    again = sample_tokens(m, eps, LABEL, 2.0, prefix=tokens, first=middle)
    assert torch.equal(again, tokens)
    other = sample_tokens(m, torch.randn_like(eps), LABEL, 2.0, prefix=tokens, first=middle)
    first = m.rows(middle).start
    assert torch.equal(other[:, :first], tokens[:, :first]) and not torch.equal(other, tokens)
    part = sample_tokens(m, eps.flip(0), LABEL, 2.0, prefix=tokens, first=1, stop=2)
    assert torch.equal(part[:, m.rows(2).start :], tokens[:, m.rows(2).start :])


def test_multinomial_has_the_right_frequencies_and_no_impossible_codes():
    p = torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0])
    eps = torch.randn(40_000, 1, 3)
    tokens = multinomial(p.log().expand(len(eps), 1, 5), eps, torch.empty(0))
    counts = torch.bincount(tokens.flatten(), minlength=5) / len(eps)
    torch.testing.assert_close(counts, p, atol=0.01, rtol=0)
    assert counts[1] == counts[4] == 0
    extreme = multinomial(p.log().expand(2, 1, 5), torch.tensor([[[-40.0]], [[40.0]]]), p)
    assert extreme.flatten().tolist() == [0, 3]


def test_guidance_of_raster_and_of_scales():
    """VAR: none at the first scale whatever the scale, (1 + cfg) l_c - cfg l_u at the last."""
    q = torch.randn(2, 9, 4)
    m = model("raster", 12)
    null = m.null_cond(q)
    c, u = m.logits(q, LABEL), m.logits(q, null)
    torch.testing.assert_close(m.logits(q, LABEL, 1.0), c)
    torch.testing.assert_close(m.logits(q, LABEL, 2.5), u + 2.5 * (c - u))
    q = torch.randn(2, 14, 4)
    m = model("scales", 12)
    c, u = m.logits(q, LABEL), m.logits(q, m.null_cond(q))
    got, cfg = m.logits(q, LABEL, 2.5), 1.5
    torch.testing.assert_close(got[:, :1], c[:, :1])
    torch.testing.assert_close(got[:, 1:5], (1 + cfg / 2) * c[:, 1:5] - cfg / 2 * u[:, 1:5])
    torch.testing.assert_close(got[:, 5:], (1 + cfg) * c[:, 5:] - cfg * u[:, 5:])
    wrong = u + 2.5 * (c - u)  # constant over the scales
    assert (got - wrong)[:, :5].abs().max() > 0.01


def test_truncation():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    p = lambda **how: log_probs(logits, Choice(**how)).exp()  # noqa: E731
    close = torch.testing.assert_close
    close(p(top_k=2), torch.tensor([0, 0.4, 0, 0.3]) / 0.7)
    close(p(top_p=0.65), torch.tensor([0, 0.4, 0, 0.3]) / 0.7)
    close(p(top_p=0.75), torch.tensor([0, 0.4, 0.2, 0.3]) / 0.9)
    close(p(top_p=0.01), torch.tensor([0.0, 1.0, 0.0, 0.0]))  # never empty
    close(p(temperature=0.5), torch.tensor([0.01, 0.16, 0.04, 0.09]) / 0.3)
    close(p(top_k=3, top_p=0.7), torch.tensor([0, 0.4, 0, 0.3]) / 0.7)  # of what top_k left
    for bad in ({"rule": "x"}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"Allowed|must be"):
            check_choice(bad)


def test_passes_are_counted():
    m = model("raster")
    sample_tokens(m, torch.randn(2, *m.shape), LABEL, 1.0)
    assert m.passes == 2 * 4
    sample_tokens(m, torch.randn(2, *m.shape), LABEL, 1.5)
    assert m.passes == 2 * 4 * 3 and m.clone().passes == 0


# ---- tokenizers -------------------------------------------------------------------------


def test_nearest_code():
    vectors, book = torch.randn(7, 5, 3), torch.randn(11, 3)
    assert torch.equal(nearest(vectors, book), torch.cdist(vectors, book).argmin(-1))


def test_refiners_of_the_published_number_of_scales():
    table = {10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 2, 3]}
    for scales, want in table.items():
        assert [refiner_of(k, scales, 4) for k in range(scales)] == want


def test_scales_add_up_to_what_the_encoder_quantised():
    vq = tiny_tokens("scales", 12).tokenizer
    x = torch.rand(3, 1, 12, 12) * 2 - 1
    with torch.no_grad():
        f = vq.features(x)
        tokens, sums, seen = vq.quantise(f)
        vectors = vq.codebook[tokens]
        for got, want in zip(vq.sums(vectors), sums, strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(vq.decode(vectors), vq.decode_map(sums[-1]))
        assert torch.equal(tokens, vq.tokens(x)) and len(seen) == 3
        # what the next scale reads is the running map, shrunk: one number at first
        inputs = vq.inputs(vectors)
        assert inputs.shape == (3, 13, 4)
        torch.testing.assert_close(inputs[:, 4:], sums[1].flatten(2).transpose(1, 2))
        small = torch.nn.functional.interpolate(sums[0], size=(2, 2), mode="area")
        torch.testing.assert_close(inputs[:, :4], small.flatten(2).transpose(1, 2))
        wrong = vectors[:, :-1]  # raster's inputs
        assert (inputs - wrong).abs().max() > 0.1


def test_scales_quantise_residuals_to_the_nearest_code():
    vq = tiny_tokens("scales", 12).tokenizer
    f = torch.randn(2, 4, 3, 3)
    tokens, sums, _ = vq.quantise(f)
    last = (f - sums[1]).permute(0, 2, 3, 1)
    assert torch.equal(tokens[:, 5:], nearest(last, vq.codebook).flatten(1))


def test_codes_have_unit_length_only_in_raster():
    raster, scales = (tiny_tokens(kind).tokenizer.codebook for kind in KINDS)
    torch.testing.assert_close(raster.norm(dim=1), torch.ones(12))
    assert (scales.norm(dim=1) - 1).abs().max() > 0.1


def test_images_of_any_even_padding_keep_their_size():
    vq = VQTokenizer(28, 1, (16, 16, 16), 1, 8, 8, 4, fold=2, norm_groups=8)
    x = torch.zeros(2, 1, 28, 28)
    assert vq.grid == 4 and vq.pad == 2
    assert vq.decode(vq.codebook[vq.tokens(x)]).shape == x.shape
    with pytest.raises(ValueError, match="evenly"):
        VQTokenizer(27, 1, (16, 16), 1, 8, 8, 4, norm_groups=8)
    with pytest.raises(ValueError, match="must be the grid"):
        VQTokenizer(8, 1, (16, 16), 1, 8, 8, 4, [1, 2], norm_groups=8)
