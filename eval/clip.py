"""CLIP score (Hessel et al., arXiv 2104.08718), in the definitions that papers use.

A score near 0.3, 30, 0.8 or 28 is another definition, not another model: see `SETTINGS`. Prompts
longer than the context are cut in the tokenizer, so that the last token stays EOT: CLIP pools
there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffdistill.eval import pixels, weights
from diffdistill.eval.networks import Extractor, exact
from diffdistill.registry import unknown

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "A photo depicts "


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """Mean cosine, from embeddings [N, d] of the images and of their prompts."""
    return float(cosines(images, texts).mean())


def cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosine of each row of [N, d] with the same row of the other: float64 [N]."""
    if images.shape != texts.shape:
        raise ValueError(f"{images.shape} image and {texts.shape} text embeddings. Give pairs")
    a, b = (np.asarray(f, np.float64) for f in (images, texts))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


# ---- networks ---------------------------------------------------------------------------


class TextImageNetwork(Protocol):
    """CLIP: images and prompts to one space; `scale` is exp of its logit scale."""

    name: str
    scale: float

    def features(self, images: Tensor) -> np.ndarray: ...
    def text(self, prompts: Sequence[str], prefix: str = "") -> np.ndarray: ...


class OpenClip(Extractor):
    """An architecture of open_clip with weights of a local file, in float32.

    OpenAI's weights were trained with quick GELU, which open_clip has only under names that end in
    -quickgelu. With the plain name they load and give other numbers; here that is a ValueError.

    Args:
        resize: "shortest" (short side, then crop) or "longest" (then pad with black).
    """

    def __init__(
        self,
        architecture: str,
        path: Path | str,
        *,
        resize: str = "shortest",
        device: str | torch.device = "cpu",
        batch: int = 64,
    ):
        import open_clip

        config = open_clip.get_model_config(architecture)
        if config is None:
            known = open_clip.list_models()
            raise ValueError(unknown("open_clip architecture", architecture, known))
        if _is_openai(path) and not config.get("quick_gelu"):
            raise ValueError(
                f"{path} holds OpenAI's weights, which need quick GELU, but {architecture!r} has "
                f"plain GELU. Use {architecture}-quickgelu"
            )
        model = open_clip.CLIP(**config)
        _load(model, path, architecture)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.scale = math.exp(model.logit_scale.item())
        size = model.visual.image_size
        self.view = open_clip.image_transform(size, is_train=False, resize_mode=resize)
        super().__init__(
            f"{architecture}:{weights.digest(path)[:8]}",
            f"open_clip-bicubic-{resize}-{size[0] if isinstance(size, tuple) else size}",
            lambda images: torch.stack([self.view(p) for p in pixels.pictures(images)]),
            self.model.encode_image,
            device=device,
            batch=batch,
        )

    def embed(self, pictures: Sequence[Image]) -> np.ndarray:
        """Image embeddings of pictures of any sizes, not normalised: float64 [N, d]."""
        with exact():
            parts = torch.stack([self.view(p) for p in pictures]).split(self.batch)
            return torch.cat([self.net(p.to(self.device)) for p in parts]).cpu().double().numpy()

    def text(self, prompts: Sequence[str], prefix: str = "") -> np.ndarray:
        """Text embeddings, not normalised: float64 [N, d]."""
        ids = tokens(self.tokenizer, prompts, prefix)
        with exact():
            parts = [self.model.encode_text(p.to(self.device)) for p in ids.split(self.batch)]
        return torch.cat(parts).cpu().double().numpy()


class HuggingFaceClip(Extractor):
    """A CLIPModel of transformers and its processor, from local folders."""

    def __init__(
        self,
        folder: Path | str,
        *,
        processor: Path | str | None = None,
        device: str | torch.device = "cpu",
        batch: int = 64,
    ):
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(str(folder), local_files_only=True)
        self.model = model.eval().requires_grad_(False).to(device)
        self.processor = CLIPProcessor.from_pretrained(
            str(processor or folder), local_files_only=True
        )
        self.scale = math.exp(model.logit_scale.item())
        super().__init__(
            f"{Path(folder).name}:{weights.digest(folder)[:8]}"
            f"+{weights.text_digest(processor or folder)[:8]}",
            "transformers-bicubic-shortest",
            self._view,
            lambda x: pooled(self.model.get_image_features(pixel_values=x)),
            device=device,
            batch=batch,
        )

    def text(self, prompts: Sequence[str], prefix: str = "") -> np.ndarray:
        """Text embeddings, not normalised: float64 [N, d]."""
        if prefix:
            raise ValueError("the prefix is inserted as tokens, and only for open_clip's networks")
        limit = self.model.config.text_config.max_position_embeddings
        parts = []
        for i in range(0, len(prompts), self.batch):
            part = list(prompts[i : i + self.batch])
            ids = self.processor.tokenizer(
                part, padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
            ).to(self.device)
            with exact():
                parts.append(pooled(self.model.get_text_features(**ids)).cpu())
        return torch.cat(parts).double().numpy()

    def _view(self, images: Tensor) -> Tensor:
        return self.processor(images=pixels.pictures(images), return_tensors="pt")["pixel_values"]


def pooled(output: Any) -> Tensor:
    """The embedding in what a feature method of CLIP returns: from transformers 5 on an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def tokens(tokenizer: Any, prompts: Sequence[str], prefix: str = "") -> Tensor:
    """Ids int64 [N, context] of open_clip's tokenizer: SOT, prefix, prompt, EOT, zeros.

    What is too long is cut, and the last token becomes EOT.
    """
    context = tokenizer.context_length
    head = [tokenizer.sot_token_id, *tokenizer.encode(prefix)]
    ids = torch.zeros(len(prompts), context, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        found = [*head, *tokenizer.encode(prompt), tokenizer.eot_token_id]
        if len(found) > context:
            found = [*found[: context - 1], tokenizer.eot_token_id]
        row[: len(found)] = torch.tensor(found)
    return ids


def _is_openai(path: Path | str) -> bool:
    """OpenAI publishes TorchScript archives; copies in other formats say so in their names."""
    path = Path(path)
    return weights.is_torchscript(path) or "openai" in f"{path.parent.name}/{path.name}".lower()


def _load(model: torch.nn.Module, path: Path | str, architecture: str) -> None:
    state = weights.tensors(path)
    for key in ("input_resolution", "context_length", "vocab_size"):  # of OpenAI's archives
        state.pop(key, None)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit {architecture}: {reason}") from error


def cmmd_network(
    path: Path | str,
    *,
    architecture: str = "ViT-L-14-336-quickgelu",
    device: str | torch.device = "cpu",
) -> OpenClip:
    """CLIP for CMMD: the central square is cut first, then resized by PIL bicubic."""
    net = OpenClip(architecture, path, device=device)
    view = net.prepare
    net.prepare = lambda images: view(pixels.centre_crop(images))
    net.resize = "square-" + net.resize
    return net


# ---- published definitions --------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a published CLIP score is computed.

    Attributes:
        model: architecture of open_clip, or "transformers".
        weights: of `weights.SOURCES`.
        factor: on the cosine; None: the network's own logit scale.
        clamp: "each": negative values become 0 before the mean; "mean": a negative mean does.
        size: px of the Lanczos resize before the network's own; 0: none.
    """

    model: str
    weights: str
    about: str
    prefix: str = ""
    factor: float | None = 1.0
    clamp: str = ""
    size: int = 0


SETTINGS = {
    "clip-g14-gigagan": Setting(
        "ViT-g-14", "clip-vitg14", "DMD, DMD2, SiD-LSG: 0.30 to 0.34", prefix=PREFIX, size=256
    ),
    "clip-b32-gigagan": Setting(
        "ViT-B-32-quickgelu", "clip-vitb32", "GigaGAN's script by default", prefix=PREFIX, size=256
    ),
    "clip-g14-plain": Setting("ViT-g-14", "clip-vitg14", "StyleGAN-T, SwiftBrush: 0.29"),
    "clip-l14-sana": Setting(
        "ViT-L-14-quickgelu", "clip-vitl14", "Sana, TBCM: about 28", factor=None
    ),
    "clip-torchmetrics": Setting(
        "transformers", "clip-vitl14-hf", "torchmetrics by default", factor=100.0, clamp="mean"
    ),
    "clip-hessel": Setting(
        "ViT-B-32-quickgelu", "clip-vitb32", "the original CLIPScore", prefix=PREFIX, factor=2.5,
        clamp="each",
    ),
}  # fmt: skip


def setting(name: str) -> Setting:
    if name not in SETTINGS:
        raise ValueError(unknown("CLIP score", name, SETTINGS))
    return SETTINGS[name]


def network_of(
    name: str,
    path: Path | str | None = None,
    *,
    device: str | torch.device = "cpu",
    allow_download: bool = False,
) -> TextImageNetwork:
    """The network of a setting. Its weights are a file for open_clip, a folder for transformers."""
    rules = setting(name)
    where = weights.find(rules.weights, path, allow_download=allow_download)
    if rules.model == "transformers":
        return HuggingFaceClip(where, device=device)
    return OpenClip(rules.model, where, device=device)


def score_each(
    name: str, net: TextImageNetwork, images: Tensor, prompts: Sequence[str]
) -> np.ndarray:
    """A published CLIP score of each of the uint8 images [N, 3, H, W] and its prompt: float64 [N].

    `net`: of `network_of`, or any other network with both sides.
    """
    rules = setting(name)
    shown = pixels.lanczos(images, rules.size) if rules.size else images
    factor = net.scale if rules.factor is None else rules.factor
    values = factor * cosines(net.features(shown), net.text(prompts, rules.prefix))
    return np.maximum(values, 0) if rules.clamp == "each" else values


def score(name: str, each: np.ndarray) -> float:
    """The published number of a set, from what `score_each` gave."""
    mean = float(np.mean(each))
    return max(mean, 0.0) if setting(name).clamp == "mean" else mean
