"""Code that takes addresses of memory (Triton, extensions, ctypes) is never run on tensors without data."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit._torch_private.dispatch import FakeTensor, fake_mode
from tightfit.solver.solver import full_plan


def doubled_by_address(x: Tensor) -> Tensor:
    """What a kernel does that is called past the dispatcher: it reads and writes at addresses."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if os.environ.get("TIGHTFIT_TEST_SHOW"):
        print("launched on", type(x).__name__, flush=True)
    ctypes.memmove(y.data_ptr(), x.data_ptr(), x.numel() * x.itemsize)
    return y.mul_(2)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return doubled_by_address(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return doubled_by_address(gradients[0])


class Native(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = Double.apply(layer(x)).tanh()
        return x.pow(2).mean()


def measure_and_verify() -> None:
    torch.manual_seed(0)
    model, batch = Native(), torch.randn(32, 64)
    profile = tightfit.measure(model, batch)
    verdict = tightfit.verify(model, batch, full_plan(profile, 2**40), reference_budget_bytes=2**40)
    print(profile.method, verdict.ok, verdict.replayed_ops > 0)


def test_measuring_takes_a_real_step_where_native_code_would_get_null_pointers() -> None:
    """In a process of its own, which such a launch would end."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import measure_and_verify; measure_and_verify()"],
        env={**os.environ, "TIGHTFIT_TEST_SHOW": "1", "TIGHTFIT_COST_CACHE": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "real True True"


@pytest.mark.parametrize("ask", [Tensor.data_ptr, Tensor.numpy, lambda x: x.untyped_storage().data_ptr()])
def test_a_tensor_without_data_has_no_address(ask: Any) -> None:
    with fake_mode():
        x = torch.ones(3)
        view = x[1:]
    assert type(view) is FakeTensor
    for tensor in (x, view):
        with pytest.raises(RuntimeError):
            ask(tensor)


def test_an_operation_without_a_fake_kernel_is_not_run_on_zeros_of_full_size() -> None:
    library = torch.library.Library("aten", "FRAGMENT")
    library.define("tightfit_unfaked(Tensor x) -> Tensor")
    sizes: list[int] = []

    def kernel(x: Tensor) -> Tensor:
        sizes.append(int(x.count_nonzero()))
        return x.detach() * 2

    library.impl("tightfit_unfaked", kernel, "CPU")

    class Unfaked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (torch.ops.aten.tightfit_unfaked(x) * self.linear(x)).sum()

    try:
        profile = tightfit.measure(Unfaked(), torch.ones(4, 8))
    finally:
        library._destroy()
    assert profile.method != "fake"
    assert 0 not in sizes


def halve_unseen(x: Tensor) -> None:
    """As a kernel of an extension that is given a tensor, and tells nobody that it writes."""
    with torch._C.DisableTorchFunction():
        address = x.data_ptr()
    memory = (ctypes.c_float * x.numel()).from_address(address)
    memory[:] = [0.5 * number for number in memory]


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in self.layers:
            hidden = up(x)
            gate = hidden.sin()  # reads it before
            halve_unseen(hidden)
            x = x + down(hidden.tanh() * gate)
        return x.pow(2).mean()


def test_the_smallest_budget_knows_what_kernels_write_unseen() -> None:
    torch.manual_seed(0)
    model, batch = Halved(), torch.randn(32, 16)
    profile = tightfit.measure(model, batch)
    assert profile.method == "real"
    with pytest.raises(tightfit.BudgetInfeasible) as found:
        tightfit.solve(profile, 1)
    budget = found.value.required_bytes
    assert budget < tightfit.solve(profile, 2**40).predicted_peak_bytes
    with pytest.raises(tightfit.BudgetInfeasible, match=f"at least {budget} bytes"):
        tightfit.fit(model, batch, budget=budget - 1, reference_budget_bytes=2**40)
    with tightfit.fit(model, batch, budget=budget, reference_budget_bytes=2**40) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.measured_peak_bytes <= budget
        assert applied.refused == {}
