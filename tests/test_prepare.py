"""What is encoded once and kept, when it is made again, where encoders are, and progress bars."""

import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffdistill import progress as bars
from diffdistill import runtime
from diffdistill.data import images, prepare
from diffdistill.denoiser import Denoiser
from diffdistill.method import Batch, Needs
from diffdistill.schedules import EDM
from diffdistill.teachers import Teacher, load_teacher, sd
from diffdistill.testing import gaussian, mixture


@pytest.fixture
def teacher():
    return load_teacher("shapes-sd")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(folder, colour, time_ns):
    """Two pictures; another colour changes no name and no size."""
    folder.mkdir(exist_ok=True)
    for i in range(2):
        file = folder / f"{i}.bmp"
        Image.new("RGB", (32, 32), (colour, 90, 30 * i)).save(file)
        file.with_suffix(".txt").write_text("a photo of a red circle")
        os.utime(file, ns=(time_ns, time_ns))
    return prepare.DataConfig(name="folder", folder=str(folder))


def stream(cfg, teacher, **needs):
    return prepare.stream(cfg, teacher, Needs(**needs), guidance=1.0, seed=0, device="cpu")


# ---- the cache --------------------------------------------------------------------------


def test_images_replaced_under_the_same_names_are_encoded_again(cache, tmp_path, teacher):
    first = stream(pictures(tmp_path / "a", 10, 1000), teacher, images=True).x
    encode, calls = teacher.to_x, []
    teacher.to_x = lambda given: calls.append(len(given)) or encode(given)
    same = stream(pictures(tmp_path / "a", 10, 1000), teacher, images=True).x
    assert calls == [] and torch.equal(first, same)
    other = stream(pictures(tmp_path / "a", 240, 1001), teacher, images=True).x
    assert calls == [2] and not torch.allclose(first, other, atol=0.1)


def test_other_captions_have_other_files(cache, tmp_path, teacher):
    """Pairs are of a condition: those of the old caption must not come with the new one."""
    cfg = pictures(tmp_path / "a", 10, 1000)
    before = prepare.source(cfg, teacher).key
    assert prepare.source(cfg, teacher).key == before
    (tmp_path / "a" / "1.txt").write_text("a photo of a blue star")
    assert prepare.source(cfg, teacher).key != before


@pytest.mark.parametrize("keep", [0, 40, -3])
def test_a_damaged_file_of_latents_is_made_again(cache, tmp_path, teacher, keep):
    cfg = pictures(tmp_path / "a", 10, 1000)
    whole = stream(cfg, teacher, images=True).x
    (file,) = cache.rglob("x.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=r"x.safetensors is damaged .* made again"):
        again = stream(cfg, teacher, images=True).x
    assert torch.equal(whole, again) and torch.equal(whole, stream(cfg, teacher, images=True).x)


def test_a_bare_network_is_given_pixels_from_minus_one_to_one(cache, tmp_path):
    bare = load_teacher(Denoiser(torch.nn.Identity(), EDM(), shape=(3, 32, 32)))
    colour = torch.tensor([255, 90, 0])
    x = stream(pictures(tmp_path / "a", 255, 1000), bare, images=True).x
    assert torch.allclose(x[0, :, 0, 0], colour / 127.5 - 1)
    assert torch.equal(bare.to_images(x)[0, :, 0, 0], colour.byte())
    assert bare.key != "238d4bb95760"  # of the version that gave 0..255 to the network


def test_labels_are_sub_folders_in_alphabetical_order(tmp_path):
    files = [tmp_path / name / "0.png" for name in ("00", "01", "sub/02")]
    assert images.labels(files, str(tmp_path), 3) == [0, 1, 2]


@pytest.mark.parametrize("left", [0, 1])
def test_images_without_captions_are_refused(tmp_path, teacher, left):
    cfg = pictures(tmp_path / "a", 10, 1000)
    for file in sorted((tmp_path / "a").glob("*.txt"))[left:]:
        file.unlink()
    with pytest.raises(ValueError, match=rf"caption .*/{left}.txt is missing .*Add it") as said:
        prepare.source(cfg, teacher)
    assert "data=prompts data.prompts=FILE" in str(said.value)
    bare = load_teacher(Denoiser(torch.nn.Identity(), EDM(), shape=(3, 32, 32)))
    assert prepare.source(cfg, bare).conditions == [None, None]


def test_text_embeddings_are_made_once(cache, tmp_path, teacher):
    encode, calls = teacher.encode, []
    teacher.encode = lambda prompts: calls.append(list(prompts)) or encode(prompts)
    file = tmp_path / "p.txt"
    file.write_text("a photo of a red circle\na photo of a star\na photo of a red circle\n")
    cfg = prepare.DataConfig(name="prompts", prompts=str(file))
    first, second = (stream(cfg, teacher).cond["text"](torch.arange(3)) for _ in range(2))
    assert calls == [["a photo of a red circle", "a photo of a star"]]
    want = encode(["a photo of a red circle", "a photo of a star"])["text"][[0, 1, 0]]
    assert torch.equal(first, want) and torch.equal(second, want)
    file.write_text("a photo of a red circle\na photo of a ring\na photo of a red circle\n")
    third = stream(cfg, teacher).cond["text"](torch.arange(3))
    assert len(calls) == 2 and not torch.equal(third[1], want[1])


def test_another_length_of_text_has_other_embeddings(cache, teacher):
    cfg = prepare.DataConfig(size=3)
    assert stream(cfg, teacher).cond["text"](torch.arange(3)).shape[:2] == (3, 16)
    teacher.pipe.tokenizer.model_max_length = 12
    short = load_teacher(teacher.pipe)
    short.info["world"] = "shapes"
    assert stream(cfg, short).cond["text"](torch.arange(3)).shape[:2] == (3, 12)


# ---- where encoders are -----------------------------------------------------------------


@pytest.fixture
def moves(teacher):
    """Where text encoder and autoencoder were sent; they stay where they are."""
    sent = []
    for name in ("text_encoder", "vae"):
        part = getattr(teacher.pipe, name)
        part.to = lambda device, name=name: sent.append((name, str(device)))
    return sent


def test_encoders_are_on_the_device_while_they_work_only(teacher, moves):
    teacher.encode(["a photo of a star"])
    assert moves == []  # no device was named
    teacher.device = torch.device("cuda")
    teacher.encode(["a photo of a star"])
    assert moves == [("text_encoder", "cuda"), ("text_encoder", "cpu")]
    moves.clear()
    x = teacher.to_x(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    teacher.to_images(x)
    assert moves == [("vae", "cuda"), ("vae", "cpu")] * 2
    moves.clear()
    with pytest.raises(ValueError, match="not finite"):
        teacher.to_images(x * float("nan"))
    assert moves == [("vae", "cuda"), ("vae", "cpu")]


def test_the_autoencoder_comes_to_what_a_method_decodes():
    sent = []
    vae = SimpleNamespace(
        device=torch.device("cpu"), to=sent.append, config={"shift_factor": None},
        decode=lambda z: SimpleNamespace(sample=z),
    )  # fmt: skip
    vae.config = type("Config", (dict,), {"scaling_factor": 2.0})(vae.config)
    assert sd.decode(vae, torch.ones(1)).item() == 0.5 and sent == []
    assert sd.decode(vae, torch.ones(1, device="meta")).device.type == "meta"
    assert sent == [torch.device("meta")]


def test_a_run_leaves_the_autoencoder_where_it_was(cache, teacher, moves, tmp_path):
    from accelerate import Accelerator

    from diffdistill import config, run
    from diffdistill.registry import get_method

    cfg, _ = config.compose(
        ["recipe=quickstart", "train.batch_size=2", "data.size=4", "precision.dtype=fp32",
         "precision.attention=default", "precision.channels_last=off", f"run.root={tmp_path}"]
    )  # fmt: skip
    cls = get_method(cfg.method_name)
    run.build(cfg, cls, cls.needs(cfg.method), teacher, tmp_path, Accelerator(cpu=True))
    assert teacher.device == torch.device("cpu")
    assert moves == [("text_encoder", "cpu")] * 2  # to encode the prompts, and back


# ---- progress bars ----------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
    """(what, when it is off) of every bar."""
    made, tqdm = [], bars.tqdm

    def noting(items, what, **settings):
        assert settings["delay"] == 2
        made.append((what, settings["disable"]))
        return tqdm(items, what, **settings)

    monkeypatch.setattr(bars, "tqdm", noting)
    return made


def test_what_is_encoded_has_bars(cache, tmp_path, teacher, shown):
    stream(pictures(tmp_path / "a", 10, 1000), teacher, images=True)
    said = {what for what, _ in shown}
    assert said == {"hash teacher", "encode prompts", "read images", "encode images"}
    assert {off for _, off in shown} == {None}  # on a terminal


def test_only_the_main_process_has_bars(monkeypatch, shown):
    monkeypatch.setenv("RANK", "1")
    assert len(prepare.render(prepare.scenes(3))) == 3
    assert shown == [("compose scenes", True), ("render scenes", True)]


def test_measuring_the_execution_has_a_bar(shown):
    denoiser = load_teacher(gaussian((0.7,), 0.3, EDM())).denoiser
    runtime.choose(denoiser, Batch(2, denoiser.shape, {}), runtime.PrecisionConfig())
    assert shown == [("measure execution", None)]


@pytest.mark.parametrize("name", ["shapes_sd", "shapes_dit"])
def test_teaching_a_world_of_scenes_has_bars(name, monkeypatch, shown, tmp_path):
    from diffdistill.teaching import worlds

    class Rendered(Exception):
        pass

    def stop(*_):
        raise Rendered

    monkeypatch.setattr(worlds, "_Judge", stop)
    monkeypatch.setattr(worlds, "_repeated", stop)
    monkeypatch.setattr(worlds, "_transformer", lambda *_: torch.nn.Linear(1, 1))
    settings = {"scenes": 4, "clip": {}, "base": "shapes-sd", "transformer": {}, "shift": 1.0}
    settings |= {"task_weights": [1] * 6, "start": None}
    if name == "shapes_dit":
        blank = Teacher("t", "sd3", torch.nn.Linear(1, 1), *[lambda given: given] * 3)
        load = worlds.load_teacher
        fake = lambda given: load(given) if isinstance(given, str) else blank  # noqa: E731
        monkeypatch.setattr(worlds, "load_teacher", fake)
        monkeypatch.setattr("diffusers.StableDiffusion3Pipeline", lambda **_: None)
    with pytest.raises(Rendered):
        getattr(worlds, name)(settings, tmp_path, None, None)
    assert [what for what, _ in shown][-2:] == ["compose scenes", "render scenes"]


def test_reading_images_is_put_off_until_they_are_needed(cache, tmp_path, teacher, monkeypatch):
    cfg = pictures(tmp_path / "a", 10, 1000)
    stream(cfg, teacher, images=True)
    monkeypatch.setattr(images, "_read", lambda *_: pytest.fail("an image was read"))
    stream(cfg, teacher, images=True)
    stream(cfg, teacher)


def test_the_key_of_a_teacher_holds_all_that_its_samples_depend_on():
    """Equal weights are not an equal teacher: pairs of another one must not be taken."""

    def made(mean=1.0, std=0.1, t_max=80.0):
        torch.manual_seed(0)
        return mixture([(0.0, mean)], std, EDM(t_max=t_max))

    other_prediction = Denoiser(made().net, EDM(), "v", shape=(2,))
    others = [made(mean=1.1), made(std=0.2), made(t_max=70.0), other_prediction]
    keys = [load_teacher(d).key for d in (made(), made(), *others, gaussian((0.0, 1.0), 0.1))]
    assert keys[0] == keys[1] and len(set(keys)) == len(keys) - 1


def test_the_key_of_a_pipeline_holds_its_configurations():
    teacher = load_teacher("shapes-sd")
    first = teacher.key
    assert load_teacher("shapes-sd").key == first
    config = dict(teacher.pipe.scheduler.config) | {"prediction_type": "sample"}
    teacher.pipe.scheduler = type(teacher.pipe.scheduler).from_config(config)
    assert load_teacher(teacher.pipe).key != first


def test_the_key_of_a_bare_network_with_things_of_its_own():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(width=3)
            self.act, self.steps = [lambda x: x, torch.nn.functional.gelu], (1, 2)

        def forward(self, z, t):
            return z

    made = lambda: load_teacher(Denoiser(Net(), EDM(), "x0", shape=(2,)))  # noqa: E731
    first = made()
    assert first.key == made().key  # addresses are not in it
    other = made()
    other.denoiser.net.steps = (1, 3)
    assert other.key != first.key
