"""Train the small CLIP of the shapes world: contrastive, with attribute-swapped hard negatives.

Radford et al., arXiv 2103.00020 (InfoNCE in both directions); hard negatives as in NegCLIP
(Yuksekgonul et al., arXiv 2210.01936): the captions of the batch are joined by one altered
caption per image, which differs in a single attribute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffdistill.denoiser import Runtime
from diffdistill.method import Batch, Method, MethodConfig, Update


@dataclass
class Config(MethodConfig):
    max_scale: float = 100.0  # of the logits


class Towers(nn.Module):
    """open_clip CLIP called under a runtime; normalised embeddings and the logit scale."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip, self.runtime = clip, Runtime()

    def forward(self, images, ids):
        with self.runtime.context(images.device):
            image = self.clip.encode_image(images)
            text = self.clip.encode_text(ids)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def lock_text(self) -> None:
        """From now on the text tower stays; its projection and the image tower go on learning.

        Locked-tower tuning (Zhai et al., arXiv 2111.07991), with the other tower locked.
        """
        kept = {id(p) for p in TextTower(self.clip).parameters()}
        self.trainable_names = {n for n, p in self.named_parameters() if id(p) not in kept}


class TextTower(nn.Module):
    """The hidden states of open_clip's text tower: ids int64 [B, L] -> [B, L, d].

    The weights are the CLIP's own: what trains one trains the other.
    """

    mask: torch.Tensor

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.transformer = clip.transformer
        self.ln_final = clip.ln_final
        self.register_buffer("mask", clip.attn_mask, persistent=False)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x, attn_mask=self.mask))


class Contrastive(Method):
    """Batch: x in [-1, 1], extra["ids"] and extra["hard_ids"] int64 [B, L]."""

    Config = Config
    name = "contrastive"

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self._roles = {}

    def updates(self):
        return (Update("clip", ("student",), self.loss),)

    def loss(self, batch: Batch):
        ids = torch.cat([batch.extra["ids"], batch.extra["hard_ids"]])
        image, text = self.student(batch.x, ids)
        scale = self.student.clip.logit_scale.exp().clamp(max=self.cfg.max_scale)
        logits = scale * image @ text.T  # [B, 2B]; the right half are hard negatives
        own = batch.extra["ids"]
        same = (torch.cat([own, ids[len(own) :]])[None] == own[:, None]).all(-1)  # equal captions
        target = same.float() / same.sum(1, keepdim=True)
        image_loss = -(target * logits.log_softmax(1)).sum(1).mean()
        back = logits[:, : len(own)].T
        target_back = same[:, : len(own)].float() / same[:, : len(own)].sum(1, keepdim=True)
        text_loss = -(target_back * back.log_softmax(1)).sum(1).mean()
        right = (logits.argmax(1)[:, None] == torch.arange(len(own))[:, None]).float().mean()
        return {"image": image_loss / 2, "text": text_loss / 2, "_accuracy": right}
