"""Learned judges of pictures: HPSv2, PickScore, ImageReward, LAION aesthetics.

    .name                      "scorer:first 8 digits of the SHA-256 of its weights"
    .score(images, prompts)    uint8 [N, 3, H, W] and N prompts -> float64 [N]

Each is built from its published checkpoint by open_clip or transformers, and runs in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.eval import pixels, weights
from diffdistill.eval.clip import HuggingFaceClip, OpenClip, cosines
from diffdistill.eval.networks import exact
from diffdistill.registry import unknown


class Scorer(Protocol):
    """What `METRICS` calls."""

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> np.ndarray: ...


class HPSv2:
    """Human preference score (Wu et al., arXiv 2306.09341): the cosine of a tuned CLIP.

    Papers multiply by 100: 25 to 34. v2 and v2.1 are two checkpoints of one architecture, and
    their scores are not comparable. Pictures are padded to a square with black, not cropped.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        version: str = "v2.1",
        architecture: str = "ViT-H-14",
        device: str | torch.device = "cpu",
    ):
        if version not in ("v2", "v2.1"):
            raise ValueError(f"HPS version {version!r}. Give v2 or v2.1")
        self.net = OpenClip(architecture, path, resize="longest", device=device)
        self.name = f"hps{version}:{weights.digest(path)[:8]}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Cosine, near 0.25 to 0.34."""
        _check(images, prompts)
        return cosines(self.net.features(images), self.net.text(prompts))


class PickScore:
    """PickScore (Kirstain et al., arXiv 2305.01569): logit scale * cosine; about 20 to 23.

    Papers often divide by 100. `processor` is the folder of CLIP ViT-H/14's.
    """

    def __init__(
        self, folder: Path | str, processor: Path | str, *, device: str | torch.device = "cpu"
    ):
        self.net = HuggingFaceClip(folder, processor=processor, device=device)
        self.name = f"pickscore:{self.net.name.partition(':')[2]}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Logit scale * cosine, about 20 to 23."""
        _check(images, prompts)
        return self.net.scale * cosines(self.net.features(images), self.net.text(prompts))


class Aesthetic:
    """LAION aesthetics v2: a linear head on the unit image embedding of OpenAI's CLIP ViT-L/14.

    Scale 1 to 10; Stable Diffusion has about 5.3. Prompts are not looked at.
    """

    def __init__(
        self,
        head: Path | str,
        clip: Path | str,
        *,
        architecture: str = "ViT-L-14-quickgelu",
        device: str | torch.device = "cpu",
    ):
        self.net = OpenClip(architecture, clip, device=device)
        self.head = _Head.load(weights.tensors(head), "layers.", head)
        self.name = f"aesthetic:{weights.digest(head)[:8]}+{weights.digest(clip)[:8]}"

    def score(self, images: Tensor, prompts: Sequence[str] = ()) -> np.ndarray:
        """About 1 to 10."""
        embedding = torch.from_numpy(self.net.features(images)).float()
        with exact():
            return self.head(nn.functional.normalize(embedding)).double().numpy()


class ImageReward:
    """ImageReward v1.0 (Xu et al., arXiv 2304.05977): BLIP's text encoder reads the picture.

    The state of the first token of the prompt, at most 35 tokens, goes through a linear head:
    reward = (head - 0.16717) / 1.03334, about N(0, 1).

    Args:
        path: ImageReward.pt. Its names are those of BLIP's authors; sizes are read from it.
        tokenizer: folder of bert-base-uncased's.
        heads: attention heads of the picture's and of the text's transformer.
    """

    MEAN, STD = 0.16717362830052426, 1.0333394966054072
    TOKENS = 35

    def __init__(
        self,
        path: Path | str,
        tokenizer: Path | str,
        *,
        heads: tuple[int, int] = (16, 12),
        device: str | torch.device = "cpu",
    ):
        import open_clip
        from transformers import BertTokenizer

        state = weights.tensors(path)
        self.head = _Head.load(state, "mlp.layers.", path)
        self.vision, self.text = _blip(state, heads, path)
        for part in (self.head, self.vision, self.text):
            part.eval().requires_grad_(False).to(device)
        self.tokenizer = BertTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        size = self.vision.config.image_size
        self.view = open_clip.image_transform(size, is_train=False)
        self.name = f"imagereward:{weights.digest(path)[:8]}+{weights.text_digest(tokenizer)[:8]}"
        self.device = device

    def score(self, images: Tensor, prompts: Sequence[str], batch: int = 32) -> np.ndarray:
        """Reward, about N(0, 1)."""
        _check(images, prompts)
        parts = []
        for i in range(0, len(images), batch):
            x = torch.stack([self.view(p) for p in pixels.pictures(images[i : i + batch])])
            ids = self.tokenizer(
                list(prompts[i : i + batch]), padding="max_length", truncation=True,
                max_length=self.TOKENS, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            with exact():
                seen = self.vision(x.to(self.device)).last_hidden_state
                read = self.text(
                    input_ids=ids.input_ids,
                    attention_mask=ids.attention_mask,
                    encoder_hidden_states=seen,
                ).last_hidden_state
                parts.append(self.head(read[:, 0]).cpu())
        return (torch.cat(parts).double().numpy() - self.MEAN) / self.STD


def hps_benchmark(scores: Mapping[str, Sequence[float]], groups: int = 10) -> dict[str, Any]:
    """HPSv2's table from the scores of each style (anime, concept-art, paintings, photo).

    Per style the mean, and the std over ten groups in order; overall the mean of all pictures.
    """
    styles = {}
    for style, values in scores.items():
        if not len(values) or len(values) % groups:
            raise ValueError(f"{len(values)} scores of style {style}. Give a multiple of {groups}")
        means = np.asarray(values, np.float64).reshape(groups, -1).mean(1)
        styles[style] = {"mean": float(means.mean()), "std": float(means.std())}
    return {
        "styles": styles,
        "mean": float(np.concatenate([*map(np.asarray, scores.values())]).mean()),
    }


# ---- heads and checkpoints --------------------------------------------------------------


class _Head(nn.Sequential):
    """d-1024-128-64-16-1, linear with dropout between, and no activations; output [n]."""

    def __init__(self, width: int):
        super().__init__(
            nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]

    @classmethod
    def load(cls, state: Mapping[str, Tensor], prefix: str, path: Path | str) -> _Head:
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if "0.weight" not in own:
            raise ValueError(f"{path} has no {prefix}0.weight: it is not this scorer's checkpoint")
        head = cls(own["0.weight"].shape[1])
        head.load_state_dict(own)
        return head.eval().requires_grad_(False)


_VISION = (  # BLIP's authors -> transformers
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.attn", r"encoder.layers.\1.self_attn"),
    (r"blocks\.(\d+)\.norm", r"encoder.layers.\1.layer_norm"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    ("^norm", "post_layernorm"),
)


def _blip(
    state: Mapping[str, Tensor], heads: tuple[int, int], path: Path | str
) -> tuple[nn.Module, nn.Module]:
    """BLIP's picture and text transformers."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    seen, read = (_under(state, f"blip.{part}.") for part in ("visual_encoder", "text_encoder"))
    read.pop("embeddings.position_ids", None)
    if "patch_embed.proj.weight" not in seen or "embeddings.word_embeddings.weight" not in read:
        raise ValueError(f"{path} holds no BLIP. Give {weights.SOURCES['imagereward'].files[0]}")
    width, _, patch, _ = seen["patch_embed.proj.weight"].shape
    side = round((seen["pos_embed"].shape[1] - 1) ** 0.5)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width, intermediate_size=len(seen["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=_layers(seen, "blocks"), num_attention_heads=heads[0],
            image_size=side * patch, patch_size=patch, layer_norm_eps=1e-6, hidden_act="gelu",
        )
    )  # fmt: skip
    words, hidden = read["embeddings.word_embeddings.weight"].shape
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words, hidden_size=hidden, encoder_hidden_size=width,
            intermediate_size=len(read["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(read, "encoder.layer"), num_attention_heads=heads[1],
            max_position_embeddings=len(read["embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12, hidden_act="gelu", attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    for old, new in _VISION:
        seen = {re.sub(old, new, name): value for name, value in seen.items()}
    try:
        vision.load_state_dict(seen)
        text.load_state_dict(read)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit BLIP: {reason}") from error
    return vision, text


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    at = prefix.count(".") + 1
    return 1 + max(int(k.split(".")[at]) for k in state if k.startswith(f"{prefix}."))


def _check(images: Tensor, prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts. Give pairs")


# ---- by name ----------------------------------------------------------------------------


def _hps(version: str) -> Callable[..., Scorer]:
    return lambda path, device: HPSv2(path, version=version, device=device)


SCORERS: dict[str, tuple[tuple[str, ...], Callable[..., Scorer]]] = {
    "hpsv2": (("hpsv2",), _hps("v2")),
    "hpsv2.1": (("hpsv2.1",), _hps("v2.1")),
    "pickscore": (
        ("pickscore", "clip-vith14-processor"),
        lambda path, processor, device: PickScore(path, processor, device=device),
    ),
    "imagereward": (
        ("imagereward", "bert-base-uncased"),
        lambda path, words, device: ImageReward(path, words, device=device),
    ),
    "aesthetic": (
        ("aesthetic", "clip-vitl14"),
        lambda path, clip, device: Aesthetic(path, clip, device=device),
    ),
}  # name -> weights, and what makes the scorer from their paths


def scorer(
    name: str,
    paths: Sequence[Path | str | None] = (),
    *,
    device: str | torch.device = "cpu",
    allow_download: bool = False,
) -> Scorer:
    """A scorer by name; `paths` in the order of its weights, see `weights.find`."""
    if name not in SCORERS:
        raise ValueError(unknown("scorer", name, SCORERS))
    sources, build = SCORERS[name]
    given = [*paths, *[None] * (len(sources) - len(paths))]
    found = [
        weights.find(source, path, allow_download=allow_download)
        for source, path in zip(sources, given, strict=True)
    ]
    return build(*found, device=device)
