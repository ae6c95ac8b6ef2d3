"""Composition: what wins, what is refused with which words, names, provenance, reload."""

from __future__ import annotations

import pathlib
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import yaml

from diffdistill import config, identity
from diffdistill.config import compose, fingerprint, leaves, names, to_yaml
from diffdistill.method import Method, MethodConfig
from diffdistill.registry import register_method

PROBE = ["method=config_probe", "teacher=shapes-sd", "data=shapes"]


@dataclass
class ProbeConfig(MethodConfig):
    gan_weight: float = 0.5
    times: tuple[int, ...] = (1, 2)

    def validate(self) -> None:
        if self.gan_weight < 0:
            raise ValueError(f"method.gan_weight is {self.gan_weight}. Allowed: 0 or more")


@register_method("config_probe")
class Probe(Method):
    Config = ProbeConfig


@dataclass
class OtherConfig(MethodConfig):
    depth: int = 3


@register_method("config_other")
class Other(Method):
    Config = OtherConfig


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe file; returns the argument that picks it."""

    def write(text: str, name: str = "mine") -> str:
        (tmp_path / f"{name}.yaml").write_text(text)
        return f"recipe={tmp_path / name}.yaml"

    return write


def message(argv: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        compose(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what ships -------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("recipe"))
def test_every_recipe_composes(name):
    start = ["method.init=RUN/student"] if name == "hyper_sd_last_shapes" else []
    cfg, provenance = compose([f"recipe={name}", *start])
    assert cfg.run.name.split("-")[0] == name
    assert provenance["train.steps"] == f"recipe/{name}.yaml"
    assert provenance["teacher.name"] == f"teacher/{cfg.teacher.name}.yaml"
    assert set(provenance) == {key for key, _ in leaves(asdict(cfg))}


def test_a_last_stage_asks_for_the_student_that_it_starts_from():
    assert "Set method.init=VALUE" in message(["recipe=hyper_sd_last_shapes"])


def test_the_quickstart_is_what_the_readme_says():
    cfg, _ = compose(["recipe=quickstart"])
    assert (cfg.method_name, cfg.teacher.name, cfg.data.name) == ("dmd", "shapes-sd", "shapes")


@pytest.mark.parametrize("name", names("method"))
def test_every_method_file_composes(name):
    cfg, _ = compose([f"method={name}", "teacher=shapes-sd"])
    assert cfg.method_name == name


@pytest.mark.parametrize("name", names("teacher"))
def test_every_teacher_file_names_its_teacher(name):
    assert compose([*PROBE, f"teacher={name}"])[0].teacher.name == name


@pytest.mark.parametrize("name", names("data"))
def test_every_data_file_names_its_data(name, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "a.png").write_bytes(b"")
    needed = {
        "prompts": f"data.prompts={tmp_path}/prompts.txt",
        "folder": f"data.folder={tmp_path}",
    }
    more = [needed[name]] if name in needed else []
    assert compose([*PROBE, f"data={name}", *more])[0].data.name == name
    for other in set(needed) - {name}:
        said = message([*PROBE, f"data={name}", *more, needed[other]])
        assert f"has no effect with data={name}" in said and f"or set data={other}" in said


def test_shipped_files_start_with_a_sentence_and_hold_no_interpolation():
    files = [f for g in ("recipe", "method", "teacher", "data") for f in config.folder(g).glob("*")]
    assert len(files) >= 10
    for file in files:
        text = file.read_text()
        assert text.startswith("# ") and text.partition("\n")[0].endswith("."), file
        assert "${" not in text, file


# ---- what wins --------------------------------------------------------------------------


def test_layers_in_order(recipe):
    text = "use: {teacher: shapes-sd, data: fashion, method: config_probe}\n"
    picked = recipe(text + "train: {steps: 10, batch_size: 8}\ndata: {size: 5}")
    cfg, provenance = compose([picked, "train.steps=20", "optim.student.lr=1e-3"])
    assert (cfg.train.steps, cfg.train.batch_size, cfg.data.size) == (20, 8, 5)
    assert cfg.data.name == "fashion"  # from the part, below the recipe
    assert cfg.optim["student"].lr == 1e-3
    assert cfg.optim["student"].beta1 is None  # as in optim.default
    assert provenance["train.steps"] == "command line"
    assert provenance["train.batch_size"] == picked.removeprefix("recipe=")
    assert provenance["data.name"] == "data/fashion.yaml"
    assert provenance["train.seed"] == "default"
    assert provenance["optim.student.lr"] == "command line"


def test_a_part_on_the_command_line_replaces_the_recipes_part(recipe):
    text = "use: {teacher: shapes-sd, data: shapes, method: config_probe}\n"
    picked = recipe(text + "method: {gan_weight: 3}\ndata: {size: 4}")
    assert compose([picked])[0].method == ProbeConfig(gan_weight=3.0)
    assert compose([picked, "method=config_probe"])[0].method.gan_weight == 3  # the same part
    cfg, provenance = compose([picked, "method=config_other"])
    assert cfg.method == OtherConfig() and cfg.method_name == "config_other"
    assert cfg.data.size == 4
    assert provenance["method_name"] == "command line"
    assert compose([picked, "data=none"])[0].data.size is None


def test_the_result_is_plain_dataclasses():
    cfg, _ = compose([*PROBE, "method.times=[3,4]", "ema.slow.value=0.99"])
    assert type(cfg.method) is ProbeConfig and cfg.method.times == (3, 4)
    assert type(cfg.ema) is dict and set(cfg.ema) == {"default", "slow"}
    assert type(cfg.optim) is dict and cfg.optim == {}


def test_numbers():
    cfg, _ = compose([*PROBE, "train.steps=10_000", "method.gan_weight=2", "optim.a.lr=1e-4"])
    assert cfg.train.steps == 10_000
    assert cfg.method.gan_weight == 2.0 and type(cfg.method.gan_weight) is float
    assert cfg.optim["a"].lr == 1e-4


TEXTS = ["001", "1e3", "1_0", "a #b", ".", "{x}", "[a", "off", "a: b", "~", "it's", "2026-01-02"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_taken_as_they_stand(text, tmp_path):
    cfg, _ = compose([*PROBE, f"teacher.name={text}"])
    assert cfg.teacher.name == text
    assert compose([*PROBE, f'teacher.name="{text}"'])[0].teacher.name == text
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert compose([f"recipe={tmp_path}/config.yaml"])[0].teacher.name == text


def test_null_is_none_where_a_text_may_be_missing():
    cfg, _ = compose([*PROBE, "run.name=null", "data.folder=null", "run.root=null"])
    assert cfg.run.name.startswith("config_probe_shapes-sd") and cfg.data.folder is None
    assert cfg.run.root == "null"
    assert "'null' does not exist" in message([*PROBE, "data=folder", "data.folder='null'"])


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        *(("teacher.name", text, text) for text in [*TEXTS, "null", "'a'", '"a', "'", "None"]),
        ("run.root", pathlib.Path("./007"), "007"),
        ("evaluate.n", None, None),
        ("evaluate.n", np.int64(7), 7),
        ("train.steps", "12", 12),
        ("method.gan_weight", np.float32(0.5), 0.5),
        ("method.times", (3, 4), (3, 4)),
        ("optim.a.lr", 1e-5, 1e-5),
        ("report", False, False),
        ("precision.channels_last", "off", "off"),
    ],
)
def test_values_from_python_are_not_read_as_yaml(key, value, want):
    cfg, provenance = compose([*PROBE, "run.name=x"], {key: value})
    assert dict(leaves(asdict(cfg)))[key] == want and provenance[key] == "distill"
    again, _ = compose([*PROBE, "run.name=x", config.argument(key, config.plain(key, value))])
    assert again == cfg


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.steps", None, ["train.steps", "None"]),
        ("train.steps", 1.5, ["train.steps", "Integer"]),
        ("train.stepz", 1, ["Did you mean: 'steps'"]),
        ("train.steps", "???", ["train.steps=???"]),
        ("optim", {"a": {"lr": 1e-5}}, ["optim is a section"]),
        ("evaluate.n", object(), ["evaluate.n is a object", "None, paths"]),
    ],
)
def test_values_from_python_that_are_refused(key, value, words):
    with pytest.raises(ValueError) as caught:
        compose(PROBE, {key: value})
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_on_and_off():
    cfg, _ = compose([*PROBE, "precision.channels_last=off", "report=off", "log.wandb=yes"])
    assert (cfg.precision.channels_last, cfg.report, cfg.log.wandb) == ("off", False, True)


def test_a_method_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from diffdistill.method import Method, MethodConfig\n"
        "@dataclass\nclass Config(MethodConfig):\n    depth: int = 2\n"
        "class Mine(Method):\n    Config = Config\n"
    )
    argv = [f"method={file}:Mine", "teacher=shapes-sd", "method.depth=5"]
    cfg, _ = compose(argv)
    assert cfg.method.depth == 5
    assert cfg.run.name.startswith("mine_shapes-sd-")


def test_home_folder():
    root = compose([*PROBE, "run.root=~/students"])[0].run.root
    assert root.endswith("/students") and "~" not in root


# ---- names, identity, reload ------------------------------------------------------------


def test_the_name_is_a_function_of_what_decides_the_student():
    name = lambda *more: compose(["recipe=quickstart", *more])[0].run.name  # noqa: E731
    assert name() == "quickstart"
    assert name("run.root=elsewhere", "log.every=7", "evaluate.n=9", "threads=1") == "quickstart"
    changed = name("train.steps=7", "train.seed=3")
    assert changed == name("train.seed=3", "train.steps=7")
    assert changed != name("train.steps=8", "train.seed=3")
    assert changed.startswith("quickstart-") and len(changed) == len("quickstart-") + 6
    assert name("train.steps=7", "run.name=x") == "x"
    assert name("method=lcm") != name("method=kd")


def test_the_fingerprint_ignores_what_does_not_decide_the_student():
    base = fingerprint(compose(PROBE)[0])
    same = ["run.root=x", "run.name=y", "log.every=1", "checkpoint.every=3", "evaluate.n=5"]
    assert fingerprint(compose([*PROBE, *same, "report=false"])[0]) == base
    for change in ("train.seed=1", "method.gan_weight=1", "optim.default.lr=1", "data.size=7"):
        assert fingerprint(compose([*PROBE, change])[0]) != base
    more = compose([*PROBE, "ema.slow.kind=decay"])[0]
    assert fingerprint(more) != base  # a further average


@pytest.mark.parametrize("state", ["finished", "begun", "empty"])
def test_a_run_is_continued_with_its_own_settings_only(tmp_path, state):
    (tmp_path / "config.yaml").write_text(to_yaml(compose(PROBE)[0]))
    if state == "finished":
        (tmp_path / "DONE").touch()
    elif state == "begun":
        (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    identity.refuse_another_run(tmp_path, compose([*PROBE, "report=false"])[0])
    other = compose([*PROBE, "train.batch_size=3"])[0]
    if state == "empty":
        identity.refuse_another_run(tmp_path, other)
        return
    told = rf"{state} run .*train.batch_size=\d+, now 3\)\. Set another run.name"
    with pytest.raises(ValueError, match=told):
        identity.refuse_another_run(tmp_path, other)


def test_a_default_that_changed_is_another_setting(tmp_path):
    cfg = compose(PROBE)[0]
    usual = type(cfg.train)().max_skipped
    assert cfg.train.max_skipped == usual
    text = to_yaml(cfg).replace(f"max_skipped: {usual}", f"max_skipped: {usual + 1}")
    (tmp_path / "config.yaml").write_text(text)  # as an older version wrote its default
    (tmp_path / "DONE").touch()
    with pytest.raises(ValueError, match=f"max_skipped={usual + 1}, now {usual}"):
        identity.refuse_another_run(tmp_path, cfg)


def test_a_new_option_leaves_the_fingerprint_as_it_was():
    @dataclass
    class Wider(ProbeConfig):
        later: float = 3.0

    cfg, _ = compose([*PROBE, "method.gan_weight=1"])
    wider = replace(cfg, method=Wider(gan_weight=1.0))
    assert fingerprint(wider) == fingerprint(cfg)
    assert fingerprint(replace(cfg, method=Wider(gan_weight=1.0, later=2.0))) != fingerprint(cfg)


def test_a_resolved_config_reloads(tmp_path):
    argv = [*PROBE, "method.times=[7]", "optim.student.lr=2e-5", "ema.slow.kind=halflife"]
    cfg, _ = compose([*argv, "run.name=first"])
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    again, provenance = compose([f"recipe={tmp_path}/config.yaml"])
    assert again == cfg and fingerprint(again) == fingerprint(cfg)
    assert provenance["method.times"] == f"{tmp_path}/config.yaml"
    changed, _ = compose([f"recipe={tmp_path}/config.yaml", "train.steps=3"])
    assert changed.train.steps == 3 and changed.run.name.startswith("first-")


def test_the_yaml_of_a_run_is_plain(tmp_path):
    loaded = yaml.safe_load(to_yaml(compose([*PROBE, "optim.a.lr=1e-5"])[0]))
    assert loaded["method"]["times"] == [1, 2]
    assert loaded["optim"]["a"]["lr"] == 1e-5


# ---- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian.steps=1"], ["'trian'", "Did you mean: 'train'"]),
        (["train.stepz=1"], ["'stepz' not in 'TrainConfig'", "Did you mean: 'steps'"]),
        (["method.gan_wieght=1"], ["not in 'ProbeConfig'", "Did you mean: 'gan_weight'", "times"]),
        (["optim.student.lrr=1"], ["'lrr'", "Did you mean: 'lr'"]),
        (["train.steps=1.5"], ["train.steps", "1.5", "Integer"]),
        (["train.steps=1e3"], ["train.steps", "Integer"]),
        (["train.steps=true"], ["train.steps", "Integer"]),
        (["train.steps=null"], ["train.steps", "None"]),
        (["train.steps=???"], ["train.steps=???"]),
        (["train.steps=[1"], ["train.steps=[1", "yaml"]),
        (["train.steps=${x}"], ["train.steps", "'x' not found"]),
        (["train=3"], ["train is a section", "train.FIELD=3"]),
        (["ema.default.kind=pow"], ["'pow'", "decay", "halflife", "power"]),
        (["precision.dtype=fp64"], ["'fp64'", "bf16"]),
        (["method_name=lcm"], ["method=NAME"]),
        (["steps"], ["'steps'", "key=value"]),
        (["=3"], ["key=value"]),
        (["method=config_prob"], ["unknown method", "Did you mean 'config_probe'"]),
        (["teacher=shape-sd"], ["unknown teacher", "Did you mean 'shapes-sd'", "fashion-edm"]),
        (["data=shape"], ["unknown data", "Did you mean 'shapes'", "folder"]),
        (["recipe=quikstart"], ["unknown recipe", "Did you mean 'quickstart'", "path"]),
        (["recipe=./nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["train.steps=0"], ["train.steps is 0", "1 or more"]),
        (["train.batch_size=-4"], ["train.batch_size is -4"]),
        (["optim.default.lr=0"], ["optim.default.lr is 0.0", "more than 0"]),
        (["optim.default.beta2=1"], ["optim.default.beta2 is 1.0", "less than 1"]),
        (["ema.default.value=1"], ["ema.default.value is 1.0", "less than 1"]),
        (["log.every=0"], ["log.every is 0"]),
        (["evaluate.n=1"], ["evaluate.n is 1", "2 or more"]),
        (["lora.student=-1"], ["lora.student is -1"]),
        (["method.gan_weight=-1"], ["method.gan_weight is -1.0"]),
        (["data.size=0"], ["data.size"]),
        (
            ["data=prompts", "data.prompts=missing.txt"],
            ["prompt file 'missing.txt'", "data.prompts"],
        ),
        (["data=folder", "data.folder=/nowhere"], ["image folder '/nowhere'", "data.folder"]),
        (["data.prompts=/nope"], ["data.prompts=/nope has no effect", "data=shapes", "data.size"]),
        (["optim.default.final=0.1"], ["optim.default.final=0.1 has no effect", "decay=linear"]),
        (
            ["optim.default.decay=cosine", "optim.a.decay=constant", "optim.a.final=0.1"],
            ["optim.a.final=0.1 has no effect"],
        ),
        (["run.name=../escape"], ["run.name is '../escape'", "run.root"]),
        (["run.name=.."], ["run.name is '..'"]),
    ],
)
def test_refused(argv, words):
    said = message([*PROBE, *argv])
    assert [word for word in words if word not in said] == [], said


def test_settings_without_effect_are_refused_and_others_are_not(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    start = ["method=config_probe", "teacher=shapes-sd"]
    said = message([*start, f"data.prompts={tmp_path}/p.txt"])  # data=prompts was forgotten
    assert "no effect with the teacher's own data" in said and "set data=prompts" in said
    prompts = [*start, "data=prompts", f"data.prompts={tmp_path}/p.txt"]
    assert "data.size=5 has no effect with data=prompts" in message([*prompts, "data.size=5"])
    assert compose([*start, "data.size=5"])[0].data.size == 5
    compose([*start, "optim.default.final=0.1", "optim.a.decay=linear"])
    compose([*start, "optim.default.decay=linear", "optim.a.final=0.1"])


def test_only_method_and_teacher_must_be_chosen():
    assert "recipe=NAME" in message([]) and "quickstart" in message([])
    assert "teacher=NAME" in message(["method=config_probe"])
    cfg, provenance = compose(["method=config_probe", "teacher=shapes-sd"])
    assert cfg.data.name is None and cfg.optim == {} and cfg.report is True
    set_by = {key for key, source in provenance.items() if source != "default"}
    assert set_by == {"method_name", "teacher.name", "run.name"}


def test_recipe_files_are_checked_and_named(recipe):
    use = "use: {teacher: shapes-sd, method: config_probe}\n"
    said = message([recipe(use + "train: {stepz: 3}", "typo")])
    assert "Did you mean: 'steps'" in said and "typo.yaml: train.stepz" in said
    assert "Allowed: teacher, data, method" in message([recipe("use: {techer: shapes-sd}")])
    assert "cannot read" in message([recipe("train: [")])
    assert "holds a list" in message([recipe("- 1")])
    assert "cannot read" in message([recipe("train: {steps: 1}\ntrain: {steps: 2}")])
    assert "run.name" in message([recipe(use + "run: {name: ../x}")])
