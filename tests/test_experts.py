"""Students of several experts: who is asked when, and the folders they leave."""

import json

import pytest
import torch
from safetensors.torch import load_file

import diffdistill as dd
from diffdistill.export import export_student
from diffdistill.method import Sampler
from diffdistill.parts.rollout import sample
from diffdistill.pipelines.experts import ExpertUNet
from diffdistill.pipelines.loading import load_pipeline, load_student
from diffdistill.schedules import EDM
from diffdistill.teachers import load_teacher
from diffdistill.testing import gaussian

CASES = {
    "shapes-sd": ((999.0, 749.0, 499.0), ["a photo of a red circle", "a photo of a blue star"]),
    "fashion-edm": ((80.0, 9.7, 2.5), [3, 7]),
}


def shifted(net, seed):
    """The network with noise in its weights."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g)
    return net


@pytest.mark.parametrize("name", list(CASES))
def test_the_folder_samples_as_the_method_does(name, tmp_path):
    times, conditions = CASES[name]
    teacher = load_teacher(name)
    experts = [teacher.denoiser.clone() for _ in range(2)]
    for seed, one in enumerate(experts):
        shifted(one.net, seed)
    sampler = Sampler(times, "ode", (0, 0, 1))
    folder = export_student(
        tmp_path / "student", teacher_pipe=teacher.pipe, family=teacher.family,
        weights=[one.net.unet.eval() for one in experts], sampler=sampler,
        info={"name": "two", "teacher": name, "method": "phased_dmd"},
    )  # fmt: skip
    pipe = load_student(folder)
    assert isinstance(pipe.unet, ExpertUNet)
    got = load_pipeline(folder).sample(conditions, [3, 4]).int()
    shape = teacher.denoiser.shape
    noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(s)) for s in (3, 4)]
    with torch.no_grad():
        args = teacher.denoiser.schedule, [torch.cat(noise)] * 3, teacher.encode(conditions)
        want = teacher.to_images(sample(experts, *args, sampler)).int()
        other = teacher.to_images(sample(experts[::-1], *args, sampler)).int()
    assert (got - want).abs().max() <= 1
    assert (got - other).abs().max() > 5  # and the wrong order of experts is told apart
    info = json.loads((folder / "diffdistill.json").read_text())
    assert info["experts"] == [0, 0, 1] and info["steps"] == 3
    card = (folder / "README.md").read_text()
    assert "| expert of each step | 1, 1, 2 |" in card
    if teacher.family == "sd":
        assert "diffdistill must be importable" in card and "LCMScheduler" not in card


def test_sampling_asks_the_expert_of_the_step():
    asked = []

    def student(k):
        return lambda z, t, cond: asked.append((k, float(t[0]))) or 0.5 * z

    sampler = Sampler((4.0, 2.0, 1.0), "ode", (0, 1, 1))
    sample([student(0), student(1)], EDM(), [torch.randn(2, 1)] * 3, {}, sampler)
    assert asked == [(0, 4.0), (1, 2.0), (1, 1.0)]


def test_a_run_leaves_every_expert(tmp_path):
    result = dd.distill(
        gaussian((1.0, -0.5), 0.4, EDM(t_max=5.0)), method="phased_dmd", steps=8,
        out=tmp_path / "g", train__batch_size=16, method__phase_steps=4, method__ttur=2,
        precision__dtype="fp32", threads=1,
    )  # fmt: skip
    first, second = (load_file(result.student / f"student{k}.safetensors") for k in ("", "_2"))
    assert first.keys() == second.keys() and not torch.equal(first["mean"], second["mean"])
    assert json.loads((result.student / "diffdistill.json").read_text())["experts"] == [0, 0, 1, 1]


def test_unknown_kind_of_expert():
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        ExpertUNet("Transformer", {}, [1.0])
