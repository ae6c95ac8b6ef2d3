"""Published VAR and LlamaGen checkpoints as AutoregressivePipeline.

    pipe = load_var("var_d16.pth", "vae_ch160v4096z32.pth")
    pipe = load_llamagen("c2i_L_256.pt", "vq_ds16_c2i.pt")
    pipe.save_pretrained("var-d16")        # from now on: teacher.name=var-d16

Files are safetensors, or PyTorch files that are read with weights_only. Nothing is downloaded:
VAR's are at huggingface.co/FoundationVision/var, those of LlamaGen at
huggingface.co/FoundationVision/LlamaGen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.pipelines.autoregressive import AutoregressivePipeline
from diffdistill.pipelines.token_nets import MultiScaleTransformer, RasterTransformer
from diffdistill.pipelines.vq import VQTokenizer

VAR_SCALES = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
HEAD = 64  # channels of a head in all published models
State = dict[str, Tensor]
Rules = Sequence[tuple[str, str]]  # pattern, replacement; "" drops the tensor

RESNET = [(r"nin_shortcut", "conv_shortcut")]
ATTENTION = [(r"\.norm\.", ".group_norm."), (r"\.([qkv])\.", r".to_\1."), ("proj_out", "to_out.0")]
VAR_NET = [
    (r"^lvl_1L$|^attn_bias_for_masking$|zero_k_bias$", ""),
    (r"^word_embed\.", "enter."), (r"^class_emb\.", "label."), (r"^pos_start$", "first"),
    (r"^pos_1LC$", "place"), (r"^lvl_embed\.", "scale."), (r"^shared_ada_lin\.1\.", "modulate."),
    (r"^head_nm\.ada_lin\.1\.", "final."), (r"^head\.", "output."), (r"\.attn\.mat_qkv\.", ".qkv."),
    (r"\.attn\.scale_mul_1H11$", ".temperature"), (r"\.attn\.", "."), (r"\.ffn\.fc1\.", ".up."),
    (r"\.ffn\.fc2\.", ".down."), (r"\.ada_lin\.1\.", ".modulate."), (r"\.ada_gss$", ".offset"),
]  # fmt: skip
LLAMAGEN_NET = [
    (r"^cls_embedding\.embedding_table\.", "label."), (r"^tok_embeddings\.", "enter."),
    (r"^layers\.", "blocks."), (r"\.attention\.wqkv\.", ".qkv."), (r"\.attention\.wo\.", ".proj."),
    (r"\.feed_forward\.w1\.", ".gate."), (r"\.feed_forward\.w2\.", ".down."),
    (r"\.feed_forward\.w3\.", ".up."), (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
]  # fmt: skip
VQ = [
    (r"ema_vocab_hit_SV$|codebook_used$", ""), (r"^quantize\.embedding\.weight$", "book"),
    (r"^quantize\.quant_resi\.qresi_ls\.", "phi."), (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.(block_1|0)\.", ".mid_block.resnets.0."),
    (r"\.mid\.(attn_1|1)\.", ".mid_block.attentions.0."),
    (r"\.mid\.(block_2|2)\.", ".mid_block.resnets.1."),
    (r"^encoder\.(down|conv_blocks)\.", "encoder.down_blocks."),
    (r"^decoder\.(up|conv_blocks)\.", "decoder.up_blocks."),
    (r"\.(block|res)\.", ".resnets."), (r"\.attn\.", ".attentions."),
    (r"\.downsample\.", ".downsamplers.0."), (r"\.upsample\.", ".upsamplers.0."),
]  # fmt: skip


def load_var(
    transformer: str | Path,
    tokenizer: str | Path,
    *,
    scales: Sequence[int] | None = None,
    guidance: float = 2.5,
    top_k: int = 900,
    top_p: float = 0.95,
) -> AutoregressivePipeline:
    """VAR (arXiv 2404.02905), class-conditional.

    Args:
        scales: None: the published ones of 256 or 512 pixels, whichever fits.
        guidance: VAR's `cfg` plus 1; rises linearly over the scales.
    """
    state, file = read_tensors(transformer), str(transformer)
    _expect(state, ("word_embed.weight", "pos_1LC", "lvl_embed.weight", "head.weight"), file)
    scales = _scales(state, scales)
    width, channels = state["word_embed.weight"].shape
    temperature = state.get("blocks.0.attn.scale_mul_1H11")
    net = MultiScaleTransformer(
        codes=len(state["head.weight"]), channels=channels,
        classes=len(state["class_emb.weight"]) - 1, width=width,
        layers=_count(state, r"blocks\.(\d+)\."),
        heads=width // HEAD if temperature is None else temperature.numel(), scales=scales,
        normalised=temperature is not None, shared="shared_ada_lin.1.weight" in state,
        ratio=len(state["blocks.0.ffn.fc1.weight"]) / width,
    )  # fmt: skip
    _fill(net, renamed(state, VAR_NET), file)
    vq = _tokenizer(read_tensors(tokenizer), str(tokenizer), scales[-1], scales)
    return _pipeline(net, vq, guidance, "linear", top_k, top_p)


def load_llamagen(
    transformer: str | Path,
    tokenizer: str | Path,
    *,
    grid: int = 16,
    heads: int | None = None,
    guidance: float = 2.0,
    top_k: int = 8000,
    top_p: float = 1.0,
) -> AutoregressivePipeline:
    """LlamaGen (arXiv 2406.06525), class-conditional.

    Args:
        grid: tokens on a side: 16 for 256 pixels, 24 for 384.
        heads: None: one for every 64 channels, as published.
    """
    state, file = read_tensors(transformer), str(transformer)
    label = "cls_embedding.embedding_table.weight"
    _expect(state, (label, "tok_embeddings.weight", "output.weight"), file)
    codes, width = state["tok_embeddings.weight"].shape
    if len(state["layers.0.attention.wqkv.weight"]) != 3 * width:
        raise ValueError(f"{file} shares keys among queries, which is not supported")
    vq = _tokenizer(read_tensors(tokenizer), str(tokenizer), grid, None)
    net = RasterTransformer(
        codes=codes, channels=vq.config.code_channels, classes=len(state[label]) - 1, width=width,
        layers=_count(state, r"layers\.(\d+)\."), heads=heads or width // HEAD,
        hidden=len(state["layers.0.feed_forward.w1.weight"]), grid=grid, indices=True,
    )  # fmt: skip
    _fill(net, renamed(state, LLAMAGEN_NET), file)
    return _pipeline(net, vq, guidance, "constant", top_k, top_p)


def read_tensors(file: str | Path) -> State:
    """A state dict from safetensors or a PyTorch file, out of the usual wrappings. No pickle."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"checkpoint {str(path)!r} does not exist. Published ones are at "
            "huggingface.co/FoundationVision/var and huggingface.co/FoundationVision/LlamaGen "
            "(about 4 bytes per parameter: 1.2 GB for VAR-d16, 1.4 GB for LlamaGen-L)."
        )
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own errors have many types
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which is not read. Save its state "
            f"dict as safetensors. ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a table of tensors")
    for key in ("model", "module", "state_dict"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    return {k.removeprefix("_orig_mod."): v for k, v in state.items()}


def renamed(state: State, rules: Rules) -> State:
    """Every name after all rules in order; tensors whose name a rule empties are dropped."""
    out = {}
    for name, tensor in state.items():
        for pattern, to in rules:
            if to == "" and re.search(pattern, name):
                break
            name = re.sub(pattern, to, name)
        else:
            out[name] = tensor
    return out


def _tokenizer(state: State, file: str, grid: int, scales: Sequence[int] | None) -> VQTokenizer:
    """VQVAE of VAR (with scales) or VQ model of LlamaGen."""
    _expect(
        state, ("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight"), file
    )
    new = renamed(state, VQ)
    levels = _count(new, r"encoder\.down_blocks\.(\d+)\.")
    layers = _count(new, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    widths = [
        len(new[f"encoder.down_blocks.{i}.resnets.{layers - 1}.conv2.weight"])
        for i in range(levels)
    ]
    if any(name.startswith("decoder.up.") for name in state):  # from fine to coarse
        new = {
            re.sub(
                r"^decoder\.up_blocks\.(\d+)",
                lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name,
            ): tensor
            for name, tensor in new.items()
        }  # fmt: skip
    new = dict(_attention(new))
    vq = VQTokenizer(
        size=grid * 2 ** (levels - 1), channels=new["encoder.conv_in.weight"].shape[1],
        widths=widths, layers=layers, latent=len(new["encoder.conv_out.weight"]),
        codes=len(new["book"]), code_channels=new["book"].shape[1],
        scales=None if scales is None else list(scales), normalise=scales is None,
        kernel=new["quant_conv.weight"].shape[-1],
        attention=any("down_blocks" in n and "attentions" in n for n in new),
        refiners=_count(new, r"phi\.(\d+)\."),
    )  # fmt: skip
    _fill(vq, new, file)
    return vq


def _attention(state: State) -> Iterable[tuple[str, Tensor]]:
    """1 x 1 convolutions of attention blocks as linear maps; a joint qkv in its three parts."""
    for name, tensor in state.items():
        if ".attentions." not in name:
            yield re.sub(*RESNET[0], name), tensor
            continue
        tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        if ".qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".qkv.", f".to_{part}."), piece
            continue
        for pattern, to in ATTENTION:
            name = re.sub(pattern, to, name)
        yield name, tensor


def _scales(state: State, scales: Sequence[int] | None) -> list[int]:
    tokens, count = state["pos_1LC"].shape[1], len(state["lvl_embed.weight"])
    for option in VAR_SCALES if scales is None else (tuple(scales),):
        if len(option) == count and sum(s * s for s in option) == tokens:
            return list(option)
    raise ValueError(
        f"the transformer has {tokens} tokens in {count} scales, but scales="
        f"{None if scales is None else list(scales)}. Give the side of each scale."
    )


def _count(state: Iterable[str], pattern: str) -> int:
    """One more than the largest index that the pattern finds at the start of a name."""
    found = (re.match(pattern, name) for name in state)
    return max((int(m[1]) for m in found if m), default=-1) + 1


def _expect(state: State, names: Sequence[str], file: str) -> None:
    if missing := [n for n in names if n not in state]:
        raise ValueError(f"{file} has no tensor {missing[0]!r}: it is another kind of checkpoint")


def _fill(module: nn.Module, state: State, file: str) -> None:
    """Load every tensor; shapes may differ by dimensions of length 1."""
    own = module.state_dict()
    odd = sorted(set(own) ^ set(state))
    if odd:
        raise ValueError(f"{file} does not fit {type(module).__name__}: {', '.join(odd[:4])}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.numel() != state[name].numel():
                shapes = f"{tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
                raise ValueError(f"{file}: {name} is {shapes}")
            tensor.copy_(state[name].reshape(tensor.shape))


def _pipeline(net, vq, guidance, rule, top_k, top_p) -> AutoregressivePipeline:
    return AutoregressivePipeline(
        net.eval(), vq.eval(), guidance=guidance, rule=rule, top_k=top_k, top_p=top_p
    )
