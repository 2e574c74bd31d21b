"""`memory_cap=True`: the budget as a cap on what the allocator reserves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit.device import device_for
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.solver.solver import Solver

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
MIB = 2**20


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


def make() -> tuple[nn.Module, Tensor, torch.optim.Optimizer]:
    model = Layers().to("cuda")
    return model, torch.randn(8192, 512, device="cuda"), torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def fraction_of_one() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def capped_bytes() -> float:
    return torch.cuda.get_per_process_memory_fraction() * torch.cuda.mem_get_info()[1]


def test_the_cap_is_the_budget_and_goes_with_the_plan() -> None:
    model, batch, optimizer = make()
    profile = tightfit.measure(model, batch, optimizer=optimizer)
    solver = Solver(profile)
    smallest, plain = solver.minimum_budget()[0], solver.plain(0).predicted_peak_bytes
    budget = (smallest + plain) // 2
    applied = tightfit.fit(model, batch, budget=budget, optimizer=optimizer, memory_cap=True)
    assert profile.allocator is not None
    assert capped_bytes() == pytest.approx(budget - profile.allocator.outside_bytes, abs=1)
    torch.cuda.reset_accumulated_memory_stats()
    for step in range(6):
        torch.cuda.reset_peak_memory_stats()
        applied.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step < 3)
        assert torch.cuda.max_memory_reserved() <= budget
    assert applied.plan.flushes_per_step <= 1
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(budget, dtype=torch.uint8, device="cuda")
    applied.remove()
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


@pytest.mark.parametrize(
    ("order", "all_share"),
    [((8192, 5000, 6900, 3300), True), ((3300, 8192, 6900, 8000, 5000, 8192, 100), False)],
)
def test_batches_of_several_sizes_in_turn_keep_the_budget(order: tuple[int, ...], all_share: bool) -> None:
    model, batch, optimizer = make()
    profile = tightfit.measure(model, batch, optimizer=optimizer)
    assert profile.allocator is not None
    solver = Solver(profile)
    smallest, plain = solver.minimum_budget()[0], solver.plain(0).predicted_peak_bytes
    budget = smallest + (plain - smallest) // 4
    applied = tightfit.fit(model, batch, budget=budget, optimizer=optimizer)
    torch.cuda.reset_peak_memory_stats()  # planning within the loop counts, too
    given_back = []
    for _ in range(4):
        for size in order:
            applied.loss(model, batch[:size]).backward()
            optimizer.step()
            optimizer.zero_grad()
        given_back.append(torch.cuda.memory_stats()["segment.all.freed"])
    assert torch.cuda.max_memory_reserved() <= budget - profile.allocator.outside_bytes
    assert applied.plans is not None
    assert len(applied.plans) == len(set(order))
    if all_share:  # the cache stays, so that no step waits for the device
        assert given_back[2] == given_back[3]
    applied.remove()


def test_a_lower_cap_stays_and_comes_back() -> None:
    model, batch, optimizer = make()
    torch.cuda.set_per_process_memory_fraction(0.25)
    applied = tightfit.fit(model, batch, budget="50%", optimizer=optimizer, memory_cap=True)
    assert torch.cuda.get_per_process_memory_fraction() == 0.25
    applied.remove()
    assert torch.cuda.get_per_process_memory_fraction() == 0.25


def test_a_fit_that_fails_puts_the_cap_back() -> None:
    model, batch, optimizer = make()
    torch.cuda.set_per_process_memory_fraction(0.5)
    with pytest.raises(BudgetInfeasible):
        tightfit.fit(model, batch, budget=200 * MIB, optimizer=optimizer, memory_cap=True)
    assert torch.cuda.get_per_process_memory_fraction() == 0.5


@pytest.mark.parametrize("name", ["PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_ALLOC_CONF"])
def test_what_is_not_modelled_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = "1" if name == "PYTORCH_NO_CUDA_MEMORY_CACHING" else "throw_on_cudamalloc_oom:True"
    monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(
        "tightfit._torch_private.libraries.torch._C._accelerator_getAllocatorSettings", str, raising=False
    )
    model, batch, optimizer = make()
    with pytest.raises(UnsupportedInput, match=value.partition(":")[0] if ":" in value else name):
        tightfit.fit(model, batch, optimizer=optimizer)


def test_tensors_beside_the_step_and_cublas_s_workspaces_are_counted() -> None:
    model, batch, optimizer = make()
    allocator: list[Any] = []
    for beside in (0, 300):
        held = torch.empty(beside * MIB, dtype=torch.uint8, device="cuda")
        allocator.append(tightfit.measure(model, batch, optimizer=optimizer).allocator)
        del held
    assert allocator[1].beside_bytes - allocator[0].beside_bytes == 300 * MIB
    torch.cuda.empty_cache()
    for _ in range(2):
        model(batch).backward()
        model.zero_grad()
    torch.cuda.synchronize()
    own = sum(-(-one.nbytes // 512) * 512 for one in (*model.parameters(), batch))
    of_the_loop = 2 * MIB  # a segment for small tensors
    assert torch.cuda.memory_allocated() - own + of_the_loop == allocator[0].beside_bytes


def test_a_gpu_without_a_number_is_capped_as_the_current_one() -> None:
    device = device_for("cuda")
    undo = device.cap_held(device.capacity_bytes() // 2)
    capped = torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device())
    with device.uncapped():
        assert torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device()) == 1.0
    assert 0.4 < capped < 0.5
    undo()
    assert torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device()) == 1.0
