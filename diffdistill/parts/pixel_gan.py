"""A discriminator of decoded images: heads on the features of a frozen encoder.

Heads as in ADM (arXiv 2507.18569): strided convolutions, a global average, one logit per feature.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.parts.reward import load_function

Encoder = Callable[[Tensor], list[Tensor]]  # images -> features [B, C, h, w]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Plain(nn.Module):
    """No encoder: the heads look at the image itself."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class Sam(nn.Module):
    """Four evenly spaced layers of SAM's image encoder, from a local folder of transformers."""

    def __init__(self, folder: str):
        super().__init__()
        if not (Path(folder).expanduser() / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no SAM. Get one (facebook/sam-vit-base, 375 MB): "
                "huggingface-cli download facebook/sam-vit-base --local-dir FOLDER, and set "
                "method.encoder=sam:FOLDER"
            )
        from transformers import SamVisionModel

        where = Path(folder).expanduser()
        model = SamVisionModel.from_pretrained(where, local_files_only=True)
        self.model, self.size = model, model.config.image_size
        depth = model.config.num_hidden_layers
        self.layers = [depth * i // 4 - 1 for i in (1, 2, 3, 4)]

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []

        def hook(_module: nn.Module, _args: object, output: Tensor | tuple) -> None:
            tokens = output[0] if isinstance(output, tuple) else output  # [B, h, w, C]
            found.append(tokens.permute(0, 3, 1, 2))

        blocks = self.model.vision_encoder.layers
        handles = [blocks[i].register_forward_hook(hook) for i in self.layers]
        try:
            self.model(x)
        finally:
            for handle in handles:
                handle.remove()
        return found


class Head(nn.Sequential):
    """[B, C, h, w] -> logit [B, 1]; at most three strided convolutions, fewer on small maps."""

    def __init__(self, channels: int, size: int, width: int):
        layers: list[nn.Module] = []
        for _ in range(min(3, size.bit_length() - 1)):
            layers += [nn.Conv2d(channels, width, 4, 2, 1), *_norm(width)]
            channels = width
        layers += [nn.Conv2d(channels, width, 3, 1, 1), *_norm(width)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))


def _norm(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(min(32, width // 8), width), nn.SiLU()


class PixelGan(nn.Module):
    """Images in [-1, 1] -> logits [B, 1], the mean over the heads. Only the heads train.

    The encoder is frozen but keeps the graph: gradients reach the image.

    Args:
        encoder: images [B, 3, size, size], normalised as ImageNet, -> features [B, C, h, w]. An
            attribute `size` is the side that it takes; without it images keep theirs.
        shape: of one image.
        width: channels of the heads.
    """

    def __init__(self, encoder: nn.Module, shape: tuple[int, ...], width: int):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        with torch.no_grad():
            features = self.features(torch.zeros(1, *shape))
        self.heads = nn.ModuleList(Head(f.shape[1], min(f.shape[2:]), width) for f in features)
        self.trainable_names = {n for n, _ in self.named_parameters() if n.startswith("heads.")}

    def train(self, mode: bool = True) -> PixelGan:
        super().train(mode)
        self.encoder.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        x = images.float() / 2 + 0.5
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        size = getattr(self.encoder, "size", None)
        if size is not None and x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return self.encoder((x - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        pairs = zip(self.heads, self.features(images), strict=True)
        return torch.stack([head(f) for head, f in pairs]).mean(0)


def pixel_gan(teacher: Denoiser, encoder: str, width: int, crop: int) -> PixelGan:
    """The discriminator of what this teacher's samples look like. For a role.

    Args:
        encoder: "pixels" (none), "sam:FOLDER", or the name of a function that builds a module.
        crop: as in `to_pixels`.

    Raises:
        ValueError: the samples are no images, or there is no such encoder.
    """
    if len(teacher.shape) != 3:
        raise ValueError(
            f"a discriminator of images cannot look at samples of shape {teacher.shape}. Set "
            "method.gan=0"
        )
    device = next(teacher.parameters()).device
    with torch.no_grad():
        image = to_pixels(teacher, torch.zeros(1, *teacher.shape, device=device), crop)
    return PixelGan(build_encoder(encoder), image.shape[1:], width)


def build_encoder(name: str) -> nn.Module:
    """The encoder of a name, see `pixel_gan`."""
    if name == "pixels":
        return Plain()
    if name.startswith("sam:"):
        return Sam(name.removeprefix("sam:"))
    return load_function(name)()


def to_pixels(teacher: Denoiser, x: Tensor, crop: int) -> Tensor:
    """Samples as images in [-1, 1]: a random square of side `crop` (0: all) of them, decoded."""
    if crop and crop < min(x.shape[2:]):
        top, left = (int(torch.randint(n - crop + 1, ())) for n in x.shape[2:])
        x = x[:, :, top : top + crop, left : left + crop]
    return teacher.decode(x) if teacher.decode else x


def hinge_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean relu(1 - logit of reals) + mean relu(1 + logit of fakes)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """-mean logit."""
    return -fake_logits.mean()
