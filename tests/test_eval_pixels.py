"""Quantisers, crops and the resizes that tell one FID from another."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffdistill.eval import pixels


def noise(n, size, wide=None, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, wide or size), generator=made, dtype=torch.uint8)


def test_10_mean_error_of_the_quantisers():
    x = 2 * torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) - 1
    exact = 127.5 * (x.double() + 1)
    errors = {rule: (pixels.quantise(x, rule).double() - exact).mean() for rule in pixels.RULES}
    assert abs(errors["round"]) < 0.01
    assert errors["dmd2"] == pytest.approx(-0.5, abs=0.01)


def test_10_ends_of_the_range_and_what_lies_beyond():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert pixels.quantise(x).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="round, dmd2"):
        pixels.quantise(x, "floor")


def test_11_antialiasing_matters_when_shrinking_only():
    big, small = noise(1, 512), noise(1, 32)

    def smooth(images):
        size = (299, 299)
        return F.interpolate(images.float(), size, mode="bilinear", antialias=True)

    assert pixels.bilinear(big).std() == pytest.approx(49, abs=1)
    assert smooth(big).std() == pytest.approx(29, abs=1)
    assert (pixels.bilinear(small) - smooth(small)).abs().max() < 1e-3


def test_11_tf1_and_half_pixel_grids_differ():
    """By 0.5 (1 - 32/299) input pixels: on a ramp, that many levels of its slope."""
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32) * 4
    gap = pixels.tf1_bilinear(ramp) - pixels.bilinear(ramp)
    inside = slice(20, 280)
    want = torch.full((260,), 4 * 0.5 * (1 - 32 / 299))
    torch.testing.assert_close(gap[0, 0, 150, inside], want, atol=1e-4, rtol=0)


def test_tf1_bilinear_by_hand():
    """2 -> 4 pixels at 0, 0.5, 1 and 1.5; beyond the last pixel it is repeated."""
    x = torch.tensor([[0, 100], [40, 140]], dtype=torch.uint8).expand(1, 3, 2, 2)
    rows = pixels.tf1_bilinear(x, 4)[0, 0]
    assert rows[0].tolist() == [0, 50, 100, 100]
    assert rows[1].tolist() == [20, 70, 120, 120]
    assert rows[3].tolist() == [40, 90, 140, 140]


@pytest.mark.parametrize("size", [40, 400])
def test_resizes_are_cleanfids(size):
    from cleanfid.resize import build_resizer

    images = noise(2, size, size + 8)
    for mode, ours in (("clean", pixels.pil_bicubic), ("legacy_pytorch", pixels.bilinear)):
        with warnings.catch_warnings():  # their PyTorch mode silences all warnings
            theirs = build_resizer(mode)(images[1].permute(1, 2, 0).numpy())
        torch.testing.assert_close(ours(images)[1], torch.from_numpy(theirs).permute(2, 0, 1))


def test_wrong_quantised_or_antialiased_resize_is_not_cleanfids():
    images = noise(1, 400)
    clean = pixels.pil_bicubic(images)
    assert (clean - clean.round()).abs().max() > 0.4
    smooth = F.interpolate(images.float(), (299, 299), mode="bilinear", antialias=True)
    assert (pixels.bilinear(images) - smooth).abs().max() > 20


def test_centre_crop_keeps_the_middle():
    x = torch.arange(7).expand(1, 1, 4, 7)
    assert pixels.centre_crop(x)[0, 0, 0].tolist() == [2, 3, 4, 5]
    assert pixels.centre_crop(x, 2)[0, 0].tolist() == [[2, 3], [2, 3]]


def test_lanczos_is_pils_on_the_central_square():
    images = noise(2, 300, 400)
    square = Image.fromarray(images[1].permute(1, 2, 0).numpy()).crop((50, 0, 350, 300))
    want = np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS))
    assert np.array_equal(pixels.lanczos(images, 256)[1].permute(1, 2, 0), want)


def test_short_side_then_crop():
    images = noise(1, 100, 201)
    whole = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    want = np.asarray(whole.resize((128, 64), Image.Resampling.BILINEAR))[:, 32:96]
    assert np.array_equal(pixels.short_side(images, 64)[0].permute(1, 2, 0), want)


def test_patch_is_uncropped_when_small():
    big, small = noise(1, 320, 400), noise(1, 200, 400)
    assert torch.equal(pixels.patch(big), big[..., 10:309, 50:349])
    assert torch.equal(pixels.patch(small), small)
    assert torch.equal(pixels.pil_bicubic(pixels.patch(big)), pixels.patch(big).float())


def test_grey_images_become_three_equal_channels():
    grey = noise(2, 8)[:, :1]
    assert torch.equal(pixels.rgb(grey)[:, 2], grey[:, 0])
    with pytest.raises(ValueError, match=r"float32 \[2, 1, 8, 8\]"):
        pixels.rgb(grey.float())
