"""The notebook runs on a small run, and what it shows is right."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from diffdistill.data import fashion
from diffdistill.export import export_student
from diffdistill.method import Sampler
from diffdistill.pipelines.edm import EDMPipeline
from diffdistill.pipelines.loading import load_pipeline
from diffdistill.pipelines.scheduler import HeunEDMScheduler
from diffdistill.tracking import save_grid

NOTEBOOK = Path(__file__).parents[1] / "assets" / "notebooks" / "inspect.ipynb"


@pytest.fixture
def run(tmp_path):
    """A run with an untrained 28 x 28 student, three grids and one evaluation."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, num_class_embeds=11,
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), add_attention=False,
    ).eval()  # fmt: skip
    teacher = EDMPipeline(unet, HeunEDMScheduler(4), size=28)
    teacher.save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    export_student(
        folder / "student", teacher_pipe=teacher, family="edm", weights=unet,
        sampler=Sampler((80.0, 2.5)),
        info={"teacher": str(tmp_path / "teacher"), "world": "fashion", "method": "dmd"},
    )  # fmt: skip
    (folder / "config.yaml").write_text("a: 1\n")
    for name in ("teacher_000000", "student_000000", "student_000010"):
        save_grid(torch.zeros(8, 1, 28, 28, dtype=torch.uint8), 8, folder / f"samples/{name}.png")
    record = {
        "metric": "fd", "value": 12.5, "protocol": "none-v1", "feature_net": "net", "n": 100,
        "m": 10, "resize": "none", "reference": "r", "steps": 2, "nfe": 2, "guidance": 0,
    }  # fmt: skip
    (folder / "eval").mkdir()
    (folder / "eval" / "step_000010.json").write_text(json.dumps({"records": [record]}))
    return folder


def test_notebook_runs_and_finds_the_copied_training_image(run, monkeypatch, capsys):
    monkeypatch.setenv("DIFFDISTILL_RUN", str(run))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    notebook = json.loads(NOTEBOOK.read_text())
    space: dict = {}

    def training(split):
        images = torch.randint(0, 256, (20, 1, 28, 28)).to(torch.uint8)
        images[7] = space["ours"][2]  # a copied one
        return images, torch.zeros(20).long()

    monkeypatch.setattr(fashion, "load", training)
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        assert not cell["outputs"]  # committed without results
        exec(compile("".join(cell["source"]), "inspect.ipynb", "exec"), space)
        plt.close("all")
    said = capsys.readouterr().out
    assert "tiny: 2 step(s), unfinished" in said and "FD, n 100, net" in said
    assert space["table"] == [("fd", "tiny", 2, 12.5)]
    assert list(space["pictures"]) == ["teacher", "step 0", "step 10"]
    assert space["nearest"][2] == 7 and space["distance"].min() == 0
    assert (space["distance"].amin(1) > 0).sum() == 7
    # the ends of the interpolation are what the two seeds draw
    student = load_pipeline(run / "student")
    assert torch.equal(space["ours"], student.sample(space["conditions"], range(8)))
    assert math.isclose(space["path"][-1].sub(space["b"]).abs().max(), 0, abs_tol=1e-5)
    assert math.isclose(space["path"][0].sub(space["a"]).abs().max(), 0, abs_tol=1e-5)
    assert space["between"].shape == (8, 1, 28, 28)
    assert space["between"][0].ne(space["between"][-1]).float().mean() > 0.5
