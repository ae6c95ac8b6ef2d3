"""CLIP score: mean cosine of image and prompt (Hessel et al., arXiv 2104.08718), unscaled."""

from __future__ import annotations

import numpy as np


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """From embeddings [N, d] of the images and of their prompts; no factor and no clamp."""
    if images.shape != texts.shape:
        raise ValueError(f"{images.shape} image and {texts.shape} text embeddings. Give pairs")
    a, b = (np.asarray(f, np.float64) for f in (images, texts))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosine.mean())
