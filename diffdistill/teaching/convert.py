"""Text towers of the shapes world in the classes that pipelines want; made by copying weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    FunnelBaseModel,
    FunnelConfig,
)


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


STREAM = 1e-3  # of the converted tower's residual stream, so that what is written last outweighs it
LINEAR = 40.0  # gelu(x + LINEAR) = x + LINEAR in float32 for all |x| < 30


@torch.no_grad()
def sd3_text_encoder(text: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same tower for pipelines that read the states before the last layer (SD3).

    They read hidden_states[-2], which the last norm has not seen. So the tower gets a layer that
    writes its normed states into the residual stream, and one more that does nothing. The stream
    is scaled by `STREAM`, to which pre-norm layers are blind: within 1 % of their spread,
    hidden_states[-2] of the result is last_hidden_state of `text`. The projection is the identity.
    """
    c = text.config
    config = CLIPTextConfig(
        **c.to_dict()
        | {
            "num_hidden_layers": c.num_hidden_layers + 2,
            "projection_dim": c.hidden_size,
            "layer_norm_eps": c.layer_norm_eps * STREAM**2,
        }
    )
    if c.hidden_act != "gelu" or c.intermediate_size < c.hidden_size:
        raise ValueError(f"cannot extend a text tower with {c.hidden_act}, {c.intermediate_size}")
    model = CLIPTextModelWithProjection(config)
    new, old = model.text_model, getattr(text, "text_model", text)
    new.embeddings.load_state_dict(old.embeddings.state_dict())
    for p in new.embeddings.parameters():
        p.mul_(STREAM)
    *copies, write, last = new.encoder.layers
    for layer, source in zip(copies, old.encoder.layers, strict=True):
        layer.load_state_dict(source.state_dict())
        for p in (*layer.self_attn.out_proj.parameters(), *layer.mlp.fc2.parameters()):
            p.mul_(STREAM)
    for layer in (write, last):
        for p in (*layer.self_attn.out_proj.parameters(), *layer.mlp.parameters()):
            p.zero_()
    write.layer_norm2.load_state_dict(old.final_layer_norm.state_dict())
    eye = torch.arange(c.hidden_size)
    write.mlp.fc1.weight[eye, eye] = 1.0
    write.mlp.fc1.bias[eye] = LINEAR
    write.mlp.fc2.weight[eye, eye] = 1.0
    write.mlp.fc2.bias.fill_(-LINEAR)
    model.text_projection.weight.copy_(torch.eye(c.hidden_size))
    return model.eval()


def silent_text_encoders(
    vocab_size: int, positions: int, width: int
) -> tuple[CLIPTextModelWithProjection, FunnelBaseModel]:
    """What fills the second and third text slot of an SD3 pipeline: both answer with zeros.

    Pipelines pad prompts to 256 tokens for the third. A Funnel transformer without anything to
    say pools them to one token in nine blocks, where a T5 would give the network 256 of them.

    Args:
        positions: of the CLIP in the second slot.
        width: channels of the first two slots together; that of the second one is 8.
    """
    clip = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=positions, projection_dim=8,
        bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1,
    )  # fmt: skip
    funnel = FunnelConfig(
        vocab_size=vocab_size, block_sizes=[1] * 9, num_decoder_layers=0, d_model=width, n_head=1,
        d_head=8, d_inner=8, attention_type="factorized", separate_cls=False, truncate_seq=False,
    )  # fmt: skip
    models = CLIPTextModelWithProjection(clip), FunnelBaseModel(funnel)
    for model in models:
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        model.eval()
    return models
