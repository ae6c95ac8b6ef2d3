"""Inception score (Salimans et al., arXiv 1606.03498): exp of the mean KL(p(y|x) || p(y)).

Logits come from the Inception network without the bias of its last layer. The samples are shuffled
with a fixed seed before they are split: with samples sorted by class every split holds one class,
and sequential splits would give 1.
"""

from __future__ import annotations

import numpy as np


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """(mean, std) over the splits, from logits [N, classes]; between 1 and the number of classes.

    The last N mod `splits` samples of the shuffled order are left out, so that splits are equal.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"logits have shape {logits.shape}. Give [N, classes], N >= {splits}")
    size = len(logits) // splits
    order = np.random.default_rng(seed).permutation(len(logits))[: size * splits]
    scores = [_score(logits[part]) for part in order.reshape(splits, size)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: np.ndarray) -> float:
    z = np.asarray(logits, np.float64)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_mean)).sum(1).mean()))
