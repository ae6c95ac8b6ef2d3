"""How the networks of a run are built."""

import pytest
import torch

from diffdistill.method import Method, MethodConfig
from diffdistill.registry import get_method
from diffdistill.run import make_roles
from diffdistill.teachers import load_teacher
from diffdistill.testing import tiny_denoiser


def with_rank(teacher, rank):
    class Mine(Method):
        pass

    return make_roles(Mine(MethodConfig(), teacher), teacher, {"student": rank})["student"]


def test_a_students_adapter_is_where_and_as_diffusers_has_it():
    pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    student = with_rank(load_teacher("shapes-sd").denoiser, 8)
    (adapter,) = student.net.unet.peft_config.values()  # an export looks here
    assert (adapter.r, adapter.lora_alpha) == (8, 8)
    assert adapter.target_modules == {"to_q", "to_k", "to_v", "to_out.0"}
    named = dict(student.named_parameters())
    layers = {n.partition(".lora_")[0].rpartition(".attn")[2][2:] for n in student.trainable_names}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    a = torch.cat([named[n].flatten() for n in student.trainable_names if "lora_A" in n])
    assert a.std().item() == pytest.approx(1 / 8, rel=0.03) and a.abs().max() > 0.4  # a Gaussian's
    assert all((named[n] == 0).all() for n in student.trainable_names if "lora_B" in n)


def test_an_adapter_needs_attention():
    pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(ValueError, match=r"no layers for LoRA \(attention\).*Leave lora"):
        with_rank(tiny_denoiser(), 2)


@pytest.mark.parametrize("start", ["teacher", "own"])
def test_an_adapter_shares_the_storage_of_the_network_that_it_sits_on(start):
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = load_teacher("shapes-sd").denoiser
    base = teacher
    if start == "own":
        base = teacher.clone()
        with torch.no_grad():
            next(base.parameters()).add_(0.1)

    class Mine(Method):
        def roles(self):
            return {"student": "teacher" if start == "teacher" else lambda _: base}

    student = make_roles(Mine(MethodConfig(), teacher), teacher, {"student": 2})["student"]
    stored = {p.data_ptr() for p in base.parameters()}
    named = dict(student.named_parameters())
    frozen = [p for n, p in named.items() if n not in student.trainable_names]
    adapter = sum(named[n].numel() for n in student.trainable_names)
    assert all(p.data_ptr() in stored and not p.requires_grad for p in frozen)
    assert 0 < adapter < 0.05 * sum(p.numel() for p in frozen)
    z, t = torch.randn(2, *teacher.shape), torch.full((2,), 500.0, dtype=torch.float64)
    cond = teacher.null_cond(z)
    with torch.no_grad():
        torch.testing.assert_close(student(z, t, cond), base(z, t, cond))
        if start == "own":
            assert not torch.equal(student(z, t, cond), teacher(z, t, cond))


def test_adapters_of_all_copies_share_the_teachers_storage():
    """Teacher, student and fake score in the memory of one and a little (design: <= 1.15)."""
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = load_teacher("shapes-sd").denoiser
    one = sum(p.numel() for p in teacher.parameters())
    roles = make_roles(
        get_method("dmd")(get_method("dmd").Config(gan=1e-3), teacher), teacher,
        {"student": 4, "fake_score": 4},
    )  # fmt: skip
    held = {
        p.data_ptr(): p.numel()
        for module in (teacher, roles["student"], roles["fake_score"])
        for p in module.parameters()
    }
    assert one < sum(held.values()) <= 1.15 * one
    student, fake = (
        {p.data_ptr() for n, p in roles[r].named_parameters() if "lora_" in n}
        for r in ("student", "fake_score")
    )
    assert student and fake and not student & fake


@pytest.mark.parametrize(
    ("name", "lora", "told"),
    [
        (
            "dmd",
            {"fake": 4},
            r"lora\.fake: with DMD that network is not there. Allowed: student",
        ),
        (
            "phased_dmd",
            {"fake_score": 4},
            r"lora\.fake_score: .*gets whole weights",
        ),
        ("swiftbrush", {"fake_score": 4}, r"lora\.fake_score=4: this method builds that network"),
    ],
)
def test_what_cannot_be_adapted_is_refused(name, lora, told):
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = load_teacher("shapes-sd").denoiser
    method = get_method(name)(get_method(name).Config(), teacher)
    with pytest.raises(ValueError, match=told):
        make_roles(method, teacher, lora)
    make_roles(method, teacher, dict.fromkeys(lora, 0))  # no adapter is no claim


def test_an_experts_own_rank_wins_over_the_one_of_all_students():
    pytest.importorskip("peft", reason="peft is not installed")
    teacher = load_teacher("shapes-sd").denoiser
    method = get_method("phased_dmd")(get_method("phased_dmd").Config(), teacher)
    first, second = method.students
    roles = make_roles(method, teacher, {"student": 2, second: 0})
    adapted = [getattr(roles[name], "trainable_names", None) for name in (first, second)]
    assert adapted[0] and not adapted[1]
