"""Weights of foreign networks: where they come from, and where they are. Never fetched silently.

A network is given by a local path, or by a name of `SOURCES`, which is looked for in the cache
(DIFFDISTILL_CACHE or ~/.cache/diffdistill, in weights/) and downloaded only on request.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.registry import unknown

FLAG = "--allow-download"
_GITHUB, _HUB = "https://github.com/", "https://huggingface.co/"
_OPENAI = "https://openaipublic.azureedge.net/clip/models/"
_READ = 2**24  # bytes hashed at a time


@dataclass(frozen=True)
class Source:
    """Files under one address; with more than one, the network is a folder.

    Attributes:
        size: of all files, in words.
        sha256: of the file, or its first digits; "" where the publisher names none.
    """

    address: str
    files: tuple[str, ...]
    size: str
    sha256: str = ""


_HF_CLIP = (
    "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
SOURCES = {
    "inception-torchscript": Source(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/",
        ("inception-2015-12-05.pt",), "91 MiB",
    ),
    "inception-pytorch": Source(
        _GITHUB + "mseitzer/pytorch-fid/releases/download/fid_weights/",
        ("pt_inception-2015-12-05-6726825d.pth",), "91 MiB", "6726825d",
    ),
    "alexnet": Source(
        "https://download.pytorch.org/models/", ("alexnet-owt-7be5be79.pth",), "233 MiB", "7be5be79"
    ),
    "dinov2-vitl14": Source(
        _HUB + "facebook/dinov2-large/resolve/main/", ("config.json", "model.safetensors"), "1.2 GB"
    ),
    "dinov2-vitb14": Source(
        _HUB + "facebook/dinov2-base/resolve/main/", ("config.json", "model.safetensors"), "0.35 GB"
    ),
    "clip-vitl14": Source(
        _OPENAI + "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/",
        ("ViT-L-14.pt",), "890 MiB",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "clip-vitl14-336": Source(
        _OPENAI + "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/",
        ("ViT-L-14-336px.pt",), "891 MiB",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
    "clip-vitb32": Source(
        _OPENAI + "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/",
        ("ViT-B-32.pt",), "338 MiB",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    "clip-vitg14": Source(
        _HUB + "laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/",
        ("open_clip_pytorch_model.bin",), "5.5 GB",
    ),
    "clip-vitl14-hf": Source(
        _HUB + "openai/clip-vit-large-patch14/resolve/main/", _HF_CLIP, "1.7 GB"
    ),
    "pickscore": Source(
        _HUB + "yuvalkirstain/PickScore_v1/resolve/main/", _HF_CLIP[:2], "3.9 GB"
    ),
    "clip-vith14-processor": Source(
        _HUB + "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/resolve/main/", _HF_CLIP[2:], "1.4 MB"
    ),
    "hpsv2": Source(_HUB + "xswu/HPSv2/resolve/main/", ("HPS_v2_compressed.pt",), "2.0 GB"),
    "hpsv2.1": Source(_HUB + "xswu/HPSv2/resolve/main/", ("HPS_v2.1_compressed.pt",), "2.0 GB"),
    "imagereward": Source(_HUB + "THUDM/ImageReward/resolve/main/", ("ImageReward.pt",), "1.8 GB"),
    "bert-base-uncased": Source(
        _HUB + "google-bert/bert-base-uncased/resolve/main/",
        ("vocab.txt", "tokenizer_config.json"), "0.2 MB",
    ),
    "aesthetic": Source(
        _GITHUB + "christophschuhmann/improved-aesthetic-predictor/raw/main/",
        ("sac+logos+ava1-l14-linearMSE.pth",), "3.7 MB",
    ),
}  # fmt: skip


def find(name: str, path: Path | str | None = None, *, allow_download: bool = False) -> Path:
    """The file or folder of a network of `SOURCES`.

    A `path` that does not exist, or no path and nothing in the cache, is a ValueError that says
    what is missing, where it comes from, its size, and how to allow the download.
    """
    if name not in SOURCES:
        raise ValueError(unknown("weights", name, SOURCES))
    source = SOURCES[name]
    single = len(source.files) == 1
    if path is not None:
        place = Path(path).expanduser()
        there = place.is_file() if single else place.is_dir()
        if there and source.sha256 and not digest(place).startswith(source.sha256):
            warnings.warn(
                f"{place} has another SHA-256 than {source.address}{source.files[0]}, which begins "
                f"with {source.sha256[:8]}: its numbers compare with no published ones",
                stacklevel=2,
            )
    else:
        folder = _cache() if single else _cache() / name
        place = folder / source.files[0] if single else folder
        if allow_download:
            _download(folder, source)
        there = all((folder / file).is_file() for file in source.files)
    if there:
        return place
    raise ValueError(
        f"{place} is missing: the weights {name} ({', '.join(source.files)}; {source.size} from "
        f"{source.address}). Give the path of a copy, or allow the download with {FLAG}"
    )


def digest(path: Path | str) -> str:
    """SHA-256 of a file, or of the weights in a folder, as hex."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise ValueError(f"{path} holds no weights. Give a folder with .safetensors or .bin")
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(_READ):
                total.update(block)
    return total.hexdigest()


def text_digest(folder: Path | str) -> str:
    """SHA-256 of the names and contents of a processor's or tokenizer's text files, as hex."""
    total = hashlib.sha256()
    for file in sorted(p for p in Path(folder).iterdir() if p.suffix in (".json", ".txt")):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def is_torchscript(path: Path | str) -> bool:
    """A TorchScript archive, as OpenAI publishes CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tensors(path: Path | str) -> dict[str, Tensor]:
    """Name -> tensor of a .safetensors, a PyTorch or a TorchScript file. No pickle is executed.

    The tensors may be under the key `state_dict`, and names may start with `module.`.
    """
    from safetensors.torch import load_file

    if Path(path).suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own errors have many types
        raise ValueError(f"cannot read tensors from {path}: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no table of tensors. Give a checkpoint of weights")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _cache() -> Path:
    from diffdistill.data.prepare import cache_dir

    return cache_dir() / "weights"


def _download(folder: Path, source: Source) -> None:
    """What is not there yet; each file is written aside, checked and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.files:
        place, address = folder / file, source.address + file
        if place.is_file():
            continue
        try:
            torch.hub.download_url_to_file(address, str(place), hash_prefix=source.sha256 or None)
        except (OSError, RuntimeError) as error:  # no network, no space; another hash
            raise ValueError(
                f"cannot download {address}: {error}. Try again, or give the path of a copy"
            ) from error
