"""Feature networks of the embedded worlds: the small CLIP, and the Fashion-MNIST classifier.

Images enter as uint8 and are scaled to [-1, 1]; networks run in eval mode, float32, no autocast.
Nothing is downloaded: weights are the folders in assets/judges or a path that is given.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill import assets
from diffdistill.eval.networks import exact


def _weights(folder: Path, file: str) -> tuple[dict[str, Tensor], str]:
    path = folder / file
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the judge of this protocol. It ships in assets/judges; restore "
            "it, or make it with diffdistill teach (recipe shapes-sd or fashion-edm)."
        )
    return load_file(path), hashlib.sha256(path.read_bytes()).hexdigest()[:8]


class ShapesClip:
    """The CLIP of the world `shapes`, stored in open_clip's format."""

    resize = "none"

    def __init__(self, folder: Path | None = None):
        from open_clip.model import CLIP
        from transformers import CLIPTokenizer

        folder = Path(folder or assets.path("judges", "shapes-clip"))
        state, digest = _weights(folder, "open_clip_model.safetensors")
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        self.model = CLIP(**config).eval().requires_grad_(False)
        self.model.load_state_dict(state)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.name = f"shapes-clip:{digest}"

    @exact()
    def features(self, images: Tensor, batch: int = 256) -> np.ndarray:
        """Image embeddings, not normalised: float64 [N, d]."""
        parts = [self.model.encode_image(p.float() / 127.5 - 1) for p in images.split(batch)]
        return torch.cat(parts).double().numpy()

    @exact()
    def text(self, prompts: list[str], batch: int = 512) -> np.ndarray:
        """Text embeddings, not normalised: float64 [N, d]. Equal prompts are read once."""
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenizer(
            list(row), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        found = torch.cat([self.model.encode_text(p).double() for p in ids.split(batch)])
        return found[[row[prompt] for prompt in prompts]].numpy()


class FashionClassifier(nn.Module):
    """A small CNN for 28 x 28 grey images; features are its 64 penultimate activations."""

    FILE = "model.safetensors"
    resize = "none"

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)
        self.name = "fashion-classifier"

    def forward(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] -> logits."""
        return self.head(self.body(x))

    @exact()
    def features(self, images: Tensor, batch: int = 500) -> np.ndarray:
        """Penultimate activations of uint8 [N, 1, 28, 28]: float64 [N, 64]."""
        parts = [self.body(part.float() / 127.5 - 1).double() for part in images.split(batch)]
        return torch.cat(parts).numpy()

    def predict(self, images: Tensor) -> Tensor:
        """Class of uint8 [N, 1, 28, 28]: int64 [N]."""
        return self.classes(self.features(images))

    @exact()
    def classes(self, features: np.ndarray) -> Tensor:
        """Class of images whose features [N, 64] are known: int64 [N]."""
        return self.head(torch.from_numpy(features).float()).argmax(1)

    @exact()
    def confidence(self, images: Tensor, batch: int = 500) -> Tensor:
        """Softmax of the logits: float32 [N, 10]."""
        return torch.cat([F.softmax(self(p.float() / 127.5 - 1), 1) for p in images.split(batch)])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / self.FILE)

    @classmethod
    def load(cls, folder: Path | None = None) -> FashionClassifier:
        folder = Path(folder or assets.path("judges", "fashion-classifier"))
        state, digest = _weights(folder, cls.FILE)
        net = cls()
        net.load_state_dict(state)
        net.name = f"fashion-classifier:{digest}"
        return net.eval().requires_grad_(False)
