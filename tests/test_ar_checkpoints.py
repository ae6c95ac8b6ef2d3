"""VAR's and LlamaGen's published layouts, against small references written in those names."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from diffdistill.teachers import load_teacher
from diffdistill.teachers.ar_checkpoints import load_llamagen, load_var, read_tensors

SCALES = (1, 2, 3)
V, C, D, CLASSES = 10, 8, 128, 5


def module(**parts):
    out = nn.Module()
    for name, part in parts.items():
        setattr(out, name, part)
    return out


# ---- convolutional part, in CompVis' order ----------------------------------------------


def resnet(i, o):
    return module(
        norm1=nn.GroupNorm(32, i, eps=1e-6), conv1=nn.Conv2d(i, o, 3, padding=1),
        norm2=nn.GroupNorm(32, o, eps=1e-6), conv2=nn.Conv2d(o, o, 3, padding=1),
        **({"nin_shortcut": nn.Conv2d(i, o, 1)} if i != o else {}),
    )  # fmt: skip


def run_resnet(m, x):
    h = m.conv1(F.silu(m.norm1(x)))
    h = m.conv2(F.silu(m.norm2(h)))
    return h + (m.nin_shortcut(x) if hasattr(m, "nin_shortcut") else x)


def attention(c, joint):
    names = {"qkv": 3 * c} if joint else {"q": c, "k": c, "v": c}
    convs = {n: nn.Conv2d(c, o, 1) for n, o in names.items()}
    return module(norm=nn.GroupNorm(32, c, eps=1e-6), **convs, proj_out=nn.Conv2d(c, c, 1))


def run_attention(m, x):
    h = m.norm(x)
    q, k, v = m.qkv(h).chunk(3, 1) if hasattr(m, "qkv") else (m.q(h), m.k(h), m.v(h))
    w = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(x.shape[1])
    w = w.flatten(3).softmax(-1).view_as(w)
    return x + m.proj_out(torch.einsum("bhwij,bcij->bchw", w, v))


def autoencoder(widths, latent, joint):
    """Encoder and decoder stages, coarsest last; both with attention at the coarsest level."""
    down, up, last = [], [], len(widths) - 1
    for i, w in enumerate(widths):
        before = widths[max(i - 1, 0)]
        a = [attention(w, joint)] if i == last else []
        ends = {} if i == last else {"conv": nn.Conv2d(w, w, 3, stride=2)}
        down.append(([resnet(before, w)], a, ends))
    for i in reversed(range(len(widths))):
        w, before = widths[i], widths[min(i + 1, last)]
        a = [attention(w, joint) for _ in range(2)] if i == last else []
        ends = {} if i == 0 else {"conv": nn.Conv2d(w, w, 3, padding=1)}
        up.append(([resnet(before, w), resnet(w, w)], a, ends))
    return down, up


def stage(parts, names, end):
    blocks, attn, conv = parts
    made = module(**{names[0]: nn.ModuleList(blocks), "attn": nn.ModuleList(attn)})
    if conv:
        setattr(made, end, module(conv=conv["conv"]))
    return made


def run_stage(parts, x):
    blocks, attn, conv = parts
    for i, block in enumerate(blocks):
        x = run_resnet(block, x)
        x = run_attention(attn[i], x) if attn else x
    return x, conv.get("conv")


def mids(w, joint):
    return [resnet(w, w), attention(w, joint), resnet(w, w)]


class Tokenizer:
    """A VQ model in VAR's (joint=True) or LlamaGen's names, with its own forward pass."""

    def __init__(self, joint, widths=(32, 64), latent=16):
        self.joint = joint
        kernel = 3 if joint else 1
        latent = C if joint else latent
        down, up = autoencoder(widths, latent, joint)
        self.down, self.up = down, up
        self.mid = [mids(widths[-1], joint) for _ in range(2)]
        w = widths[-1]
        coder = {}
        for name, stages, mid in (("encoder", down, self.mid[0]), ("decoder", up, self.mid[1])):
            end = "downsample" if name == "encoder" else "upsample"
            if joint:
                made = [stage(s, ["block"], end) for s in stages]
                made = made if name == "encoder" else made[::-1]  # VAR counts both from fine
                body = {
                    "down" if name == "encoder" else "up": nn.ModuleList(made),
                    "mid": module(block_1=mid[0], attn_1=mid[1], block_2=mid[2]),
                }
            else:
                made = [stage(s, ["res"], end) for s in stages]
                body = {"conv_blocks": nn.ModuleList(made), "mid": nn.ModuleList(mid)}
            ends = (3, widths[0], w, latent) if name == "encoder" else (latent, w, widths[0], 3)
            coder[name] = module(
                conv_in=nn.Conv2d(ends[0], ends[1], 3, padding=1), **body,
                norm_out=nn.GroupNorm(32, ends[2], eps=1e-6),
                conv_out=nn.Conv2d(ends[2], ends[3], 3, padding=1),
            )  # fmt: skip
        quantize = module(embedding=nn.Embedding(V, C))
        if joint:
            phis = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(4))
            quantize.quant_resi = module(qresi_ls=phis)
            quantize.register_buffer("ema_vocab_hit_SV", torch.zeros(3, V))
        else:
            quantize.register_buffer("codebook_used", torch.zeros(100))
        self.net = module(
            **coder, quantize=quantize,
            quant_conv=nn.Conv2d(latent, C, kernel, padding=kernel // 2),
            post_quant_conv=nn.Conv2d(C, latent, kernel, padding=kernel // 2),
        )  # fmt: skip

    def encode(self, x):
        h = self.net.encoder.conv_in(x)
        for parts in self.down:
            h, conv = run_stage(parts, h)
            h = h if conv is None else conv(F.pad(h, (0, 1, 0, 1)))
        return self.net.quant_conv(self.end("encoder", self.middle(0, h)))

    def decode(self, f):
        h = self.middle(1, self.net.decoder.conv_in(self.net.post_quant_conv(f)))
        for parts in self.up:
            h, conv = run_stage(parts, h)
            h = h if conv is None else conv(F.interpolate(h, scale_factor=2.0))
        return self.end("decoder", h)

    def middle(self, which, h):
        a, b, c = self.mid[which]
        return run_resnet(c, run_attention(b, run_resnet(a, h)))

    def end(self, name, h):
        coder = getattr(self.net, name)
        return coder.conv_out(F.silu(coder.norm_out(h)))


# ---- transformers -----------------------------------------------------------------------


def var_state(shared, normalised, depth=2, heads=2):
    layers = {"word_embed": nn.Linear(C, D), "class_emb": nn.Embedding(CLASSES + 1, D),
              "lvl_embed": nn.Embedding(3, D), "head": nn.Linear(D, V),
              "head_nm": module(ada_lin=nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D)))}  # fmt: skip
    blocks = []
    for _ in range(depth):
        attn = module(
            mat_qkv=nn.Linear(D, 3 * D, bias=False), proj=nn.Linear(D, D),
            q_bias=nn.Parameter(torch.randn(D)), v_bias=nn.Parameter(torch.randn(D)),
        )  # fmt: skip
        attn.register_buffer("zero_k_bias", torch.zeros(D))
        if normalised:
            attn.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        block = module(attn=attn, ffn=module(fc1=nn.Linear(D, 4 * D), fc2=nn.Linear(4 * D, D)))
        if shared:
            block.ada_gss = nn.Parameter(torch.randn(1, 1, 6, D))
        else:
            block.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        blocks.append(block)
    net = module(**layers, blocks=nn.ModuleList(blocks))
    net.pos_start = nn.Parameter(torch.randn(1, 1, D))
    net.pos_1LC = nn.Parameter(torch.randn(1, 14, D))
    if shared:
        net.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
    level = torch.tensor([0] + [1] * 4 + [2] * 9)
    net.register_buffer("lvl_1L", level[None])
    bias = torch.where(level[:, None] >= level, 0.0, -torch.inf)[None, None]
    net.register_buffer("attn_bias_for_masking", bias)
    return net


def run_var(net, inputs, label, shared, normalised, heads=2):
    """Logits of all positions from the inputs of the later scales, as the paper's code has it."""
    cond = net.class_emb(label)
    x = torch.cat([cond[:, None] + net.pos_start, net.word_embed(inputs)], 1)
    x = x + net.lvl_embed(net.lvl_1L) + net.pos_1LC
    norm = lambda y: F.layer_norm(y, (D,), eps=1e-6)  # noqa: E731
    for block in net.blocks:
        if shared:
            six = block.ada_gss + net.shared_ada_lin(cond).view(-1, 1, 6, D)
        else:
            six = block.ada_lin(cond).view(-1, 1, 6, D)
        g1, g2, s1, s2, b1, b2 = six.unbind(2)
        a = block.attn
        bias = torch.cat([a.q_bias, a.zero_k_bias, a.v_bias])
        qkv = F.linear(norm(x) * (1 + s1) + b1, a.mat_qkv.weight, bias)
        q, k, v = qkv.view(*x.shape[:2], 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        scale = 0.25 / math.sqrt(D // heads)
        if normalised:
            q = F.normalize(q, dim=-1) * a.scale_mul_1H11.clamp_max(math.log(100)).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        w = (scale * q @ k.transpose(-1, -2) + net.attn_bias_for_masking).softmax(-1)
        x = x + g1 * a.proj((w @ v).transpose(1, 2).flatten(2))
        h = F.gelu(block.ffn.fc1(norm(x) * (1 + s2) + b2), approximate="tanh")
        x = x + g2 * block.ffn.fc2(h)
    scale, shift = net.head_nm.ada_lin(cond).view(-1, 1, 2, D).unbind(2)
    return net.head(norm(x) * (1 + scale) + shift)


def llamagen_state(depth=2, hidden=96):
    linear = lambda i, o: nn.Linear(i, o, bias=False)  # noqa: E731
    layers = [
        module(
            attention=module(wqkv=linear(D, 3 * D), wo=linear(D, D)),
            feed_forward=module(w1=linear(D, hidden), w3=linear(D, hidden), w2=linear(hidden, D)),
            attention_norm=nn.RMSNorm(D, eps=1e-5), ffn_norm=nn.RMSNorm(D, eps=1e-5),
        )
        for _ in range(depth)
    ]  # fmt: skip
    return module(
        cls_embedding=module(embedding_table=nn.Embedding(CLASSES + 1, D)),
        tok_embeddings=nn.Embedding(V, D), layers=nn.ModuleList(layers),
        norm=nn.RMSNorm(D, eps=1e-5), output=linear(D, V),
    )  # fmt: skip


def run_llamagen(net, tokens, label, grid=3, heads=2):
    """Logits of all positions; rotations as complex numbers, 0 for the class."""
    size = D // heads
    rates = 10_000.0 ** (-torch.arange(0, size // 2, 2) / (size // 2))
    angles = [torch.cat([y * rates, x * rates]) for y in range(grid) for x in range(grid)]
    turn = torch.cat([torch.zeros(1, size // 2), torch.exp(1j * torch.stack(angles))])[: grid**2]
    h = torch.cat(
        [net.cls_embedding.embedding_table(label)[:, None], net.tok_embeddings(tokens[:, :-1])], 1
    )
    for layer in net.layers:
        qkv = layer.attention.wqkv(layer.attention_norm(h))
        q, k, v = (p.unflatten(-1, (heads, size)).transpose(1, 2) for p in qkv.chunk(3, -1))
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(p.unflatten(-1, (-1, 2)).contiguous()) * turn
            ).flatten(-2)
            for p in (q, k)
        )
        mask = torch.full((grid**2, grid**2), -torch.inf).triu(1)
        w = (q @ k.transpose(-1, -2) / math.sqrt(size) + mask).softmax(-1)
        h = h + layer.attention.wo((w @ v).transpose(1, 2).flatten(2))
        f, x = layer.feed_forward, layer.ffn_norm(h)
        h = h + f.w2(F.silu(f.w1(x)) * f.w3(x))
    return net.output(net.norm(h))


# ---- tests ------------------------------------------------------------------------------


def var_files(tmp_path, shared=False, normalised=True):
    net, vq = var_state(shared, normalised), Tokenizer(joint=True)
    torch.save(net.state_dict(), tmp_path / "var.pth")
    save_file(vq.net.state_dict(), tmp_path / "vae.safetensors")
    return net, vq, (tmp_path / "var.pth", tmp_path / "vae.safetensors")


@pytest.mark.parametrize(("shared", "normalised"), [(False, True), (True, True), (False, False)])
@torch.no_grad()
def test_var(tmp_path, shared, normalised):
    net, vq, files = var_files(tmp_path, shared, normalised)
    pipe = load_var(*files, scales=SCALES)
    m, label = pipe.model(), torch.tensor([2, 4])
    q = torch.randn(2, 14, C)
    want = run_var(net, pipe.tokenizer.inputs(q), label, shared, normalised)
    torch.testing.assert_close(m.logits(q, {"label": label}), want, atol=1e-4, rtol=1e-4)
    x = torch.randn(2, 3, 6, 6)
    f = vq.encode(x)
    torch.testing.assert_close(pipe.tokenizer.features(x), f, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipe.tokenizer.decode_map(f), vq.decode(f), atol=1e-4, rtol=1e-4)
    phi = vq.net.quantize.quant_resi.qresi_ls[3]  # of the last of three scales
    h = q[:, 5:].transpose(1, 2).reshape(2, C, 3, 3)
    sums = pipe.tokenizer.sums(q)
    torch.testing.assert_close(sums[2] - sums[1], 0.5 * h + 0.5 * phi(h), atol=1e-5, rtol=0)
    assert pipe.config.rule == "linear" and m.choice.top_k == 900
    wrong = run_var(net, pipe.tokenizer.inputs(q), label.flip(0), shared, normalised)
    assert (m.logits(q, {"label": label}) - wrong).abs().max() > 1e-2


@torch.no_grad()
def test_llamagen(tmp_path):
    net, vq = llamagen_state(), Tokenizer(joint=False)
    torch.save({"model": net.state_dict(), "steps": 3}, tmp_path / "gpt.pt")
    torch.save({"model": vq.net.state_dict()}, tmp_path / "vq.pt")
    pipe = load_llamagen(tmp_path / "gpt.pt", tmp_path / "vq.pt", grid=3)
    m, label, tokens = pipe.model(), torch.tensor([2, 4]), torch.randint(V, (2, 9))
    want = run_llamagen(net, tokens, label)
    got = m.logits(m.vectors(tokens), {"label": label})
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(m.codebook, F.normalize(vq.net.quantize.embedding.weight, dim=1))
    x = torch.randn(2, 3, 6, 6)
    f = vq.encode(x)
    unit = F.normalize(f, dim=1)
    torch.testing.assert_close(pipe.tokenizer.features(x), unit, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipe.tokenizer.decode_map(f), vq.decode(f), atol=1e-4, rtol=1e-4)
    assert (got - run_llamagen(net, tokens, label, heads=4)).abs().max() > 1e-3  # wrong heads


def test_a_loaded_checkpoint_is_a_teacher_and_a_folder(tmp_path):
    _, _, files = var_files(tmp_path)
    load_var(*files, scales=SCALES).save_pretrained(tmp_path / "var")
    teacher = load_teacher(str(tmp_path / "var"))
    assert teacher.family == "tokens" and teacher.info["steps"] == 3
    assert teacher.info["guidance"] == 2.5
    student = teacher.denoiser.variant("jump")
    cond = teacher.encode([1, 2])
    logits, vectors = student.jump(torch.randn(2, 14, C), 1, cond)
    assert logits.shape == (2, 14, V) and vectors.shape == (2, 14, C)


def test_wrong_files_are_named(tmp_path):
    _, _, files = var_files(tmp_path)
    with pytest.raises(ValueError, match="14 tokens in 3 scales"):
        load_var(*files)
    with pytest.raises(ValueError, match=r"vae.safetensors has no tensor 'word_embed"):
        load_var(files[1], files[0], scales=SCALES)
    with pytest.raises(ValueError, match="does not exist"):
        load_var(tmp_path / "none.pth", files[1], scales=SCALES)
    with pytest.raises(ValueError, match="another kind of checkpoint"):
        load_llamagen(*files)
    state = read_tensors(files[0])
    del state["head.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"does not fit MultiScaleTransformer: output\.bias"):
        load_var(tmp_path / "part.pth", files[1], scales=SCALES)


def test_pickled_code_is_refused(tmp_path):
    torch.save({"model": Tokenizer}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        read_tensors(tmp_path / "bad.pt")
