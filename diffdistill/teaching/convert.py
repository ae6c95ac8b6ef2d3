"""The text tower of an open_clip CLIP as a transformers CLIPTextModel: same ids in, same states."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel


def clip_text_model(clip: nn.Module, *, bos: int, eos: int) -> CLIPTextModel:
    """Copy weights; the model's last_hidden_state is the tower's output before pooling."""
    blocks = clip.transformer.resblocks
    width = clip.token_embedding.weight.shape[1]
    config = CLIPTextConfig(
        vocab_size=clip.token_embedding.weight.shape[0],
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=clip.positional_embedding.shape[0],
        hidden_act="gelu",
        projection_dim=clip.text_projection.shape[1],
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = CLIPTextModel(config)
    top = "text_model." if any(k.startswith("text_model.") for k in model.state_dict()) else ""
    state = {
        f"{top}embeddings.token_embedding.weight": clip.token_embedding.weight,
        f"{top}embeddings.position_embedding.weight": clip.positional_embedding,
        f"{top}final_layer_norm.weight": clip.ln_final.weight,
        f"{top}final_layer_norm.bias": clip.ln_final.bias,
    }
    for i, block in enumerate(blocks):
        to = f"{top}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                state[f"{to}self_attn.{name}.{kind}"] = part
            state[f"{to}self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
            state[f"{to}layer_norm1.{kind}"] = getattr(block.ln_1, kind)
            state[f"{to}layer_norm2.{kind}"] = getattr(block.ln_2, kind)
            state[f"{to}mlp.fc1.{kind}"] = getattr(block.mlp.c_fc, kind)
            state[f"{to}mlp.fc2.{kind}"] = getattr(block.mlp.c_proj, kind)
    with torch.no_grad():
        missing, unexpected = model.load_state_dict(state, strict=False)
    left = [k for k in missing if not k.endswith("position_ids")]
    if left or unexpected:
        raise ValueError(f"cannot convert this CLIP: missing {left}, unexpected {unexpected}")
    return model.eval()
