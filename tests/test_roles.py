"""How the networks of a run are built."""

import pytest
import torch

from diffdistill.method import Method, MethodConfig
from diffdistill.run import make_roles
from diffdistill.teachers import load_teacher


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

    student = make_roles(Mine(MethodConfig(), teacher), teacher, lora_rank=2)["student"]
    stored = {p.data_ptr() for p in base.parameters()}
    named = dict(student.named_parameters())
    frozen = [p for n, p in named.items() if n not in student.trainable_names]
    adapter = sum(named[n].numel() for n in student.trainable_names)
    assert all(p.data_ptr() in stored for p in frozen)
    assert 0 < adapter < 0.05 * sum(p.numel() for p in frozen)
    z, t = torch.randn(2, *teacher.shape), torch.full((2,), 500.0, dtype=torch.float64)
    cond = teacher.null_cond(z)
    with torch.no_grad():
        torch.testing.assert_close(student(z, t, cond), base(z, t, cond))
        if start == "own":
            assert not torch.equal(student(z, t, cond), teacher(z, t, cond))
