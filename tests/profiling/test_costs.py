"""What operations cost that are not run alone: never nothing, and a dangerous one is not tried twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tightfit.profiling import costs
from tightfit.profiling.cost_cache import CostCache, NoCache
from tightfit.profiling.costs import measure_costs
from tightfit.profiling.signatures import Call, SignatureTable

CPU = torch.device("cpu")


@torch.library.custom_op("tightfit_tests::outside", mutates_args=())
def outside(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def calls_of(*rows: tuple[Any, torch.Tensor]) -> list[Call]:
    table = SignatureTable()
    for func, tensor in rows:
        table.add(func, (tensor,), {})
    return table.calls


def operator() -> Any:
    return torch.ops.tightfit_tests.outside.default


@pytest.mark.usefixtures("measured_costs")
def test_what_cannot_be_run_alone_is_estimated_by_its_size() -> None:
    large, small = torch.ones(1 << 20), torch.ones(4)
    sine = torch.ops.aten.sin.default
    found = measure_costs(calls_of((operator(), large), (operator(), small), (sine, large)), CPU, NoCache())
    outside_large, outside_small, sine_large = found.signatures
    assert outside_large.ms == pytest.approx(sine_large.ms, rel=1e-3)
    assert outside_small.ms > 0
    assert set(found.layouts) == {2}  # they were not run


@pytest.mark.parametrize("count", [1, 5, 1 << 14, (1 << 14) + 1, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_made_up_arguments_are_full_of_numbers_near_a_half(count: int, dtype: torch.dtype) -> None:
    (call,) = calls_of((torch.ops.aten.sin.default, torch.empty(count, dtype=dtype)))
    (made,), _ = costs._make_up(call)
    parts = torch.view_as_real(made) if made.is_complex() else made
    assert bool(((parts > 0.09) & (parts < 0.91)).all())
    assert len(parts.unique()) > min(count, 50) / 2


def test_where_nothing_can_be_run_alone_costs_follow_from_bytes() -> None:
    calls = calls_of((operator(), torch.ones(1 << 20)), (operator(), torch.ones(4)))
    large, small = measure_costs(calls, CPU, NoCache()).signatures
    assert large.ms > 10 * small.ms > 0
    assert {one.ms for one in measure_costs(calls, CPU, NoCache(), timed=False).signatures} == {0.0}


def test_an_operation_that_broke_its_device_is_not_run_alone_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sine, cosine = torch.ops.aten.sin.default, torch.ops.aten.cos.default
    calls = calls_of((cosine, torch.ones(64)), (sine, torch.ones(64)))
    CostCache(CPU, tmp_path).put_dangerous(calls[1])
    ran: list[str] = []

    def run(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
        ran.append(str(call.func))
        return call.func(*args, **kwargs)

    monkeypatch.setattr(costs, "_run", run)
    known = CostCache(CPU, tmp_path)
    found = measure_costs(calls, CPU, known)
    assert set(ran) == {"aten.cos.default"}
    assert all(signature.ms > 0 for signature in found.signatures)
    dangerous = CostCache(CPU, tmp_path).get(calls[1])
    assert dangerous is not None
    assert dangerous.is_dangerous


@pytest.mark.parametrize(("rows", "note"), [(8, "measured on a part of the batch"), (0, "estimated")])
def test_a_call_whose_workspace_does_not_fit_is_run_on_a_part_of_the_batch(
    rows: int, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SignatureTable()
    image, weight = torch.ones(32, 4, 16, 16), torch.ones(4, 4, 3, 3)
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    table.add(torch.ops.aten.convolution.default, (image, weight, None, *rest), {})
    calls = table.calls
    (whole,) = measure_costs(calls, CPU, NoCache()).signatures
    run, tried = costs._run, []

    def tight(call: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        tried.append(len(args[0]))
        if len(args[0]) > rows:
            raise MemoryError
        return run(call, args, kwargs)

    monkeypatch.setattr(costs, "_run", tight)
    (part,) = measure_costs(calls, CPU, NoCache()).signatures
    assert tried[:3] == [32, 16, 8]
    assert part.note.startswith(note)
    assert not whole.note
    if rows:
        assert part.workspace_bytes % (32 // rows) == 0
        assert part.ms > 0
