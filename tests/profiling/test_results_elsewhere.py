"""A kernel that returns a result in host memory where its fake kernel says another device: measuring finds that, and
never runs what reads the result with an argument in the wrong place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tightfit._torch_private.dispatch import fake_mode
from tightfit.profiling.cost_cache import Cost, CostCache, NoCache
from tightfit.profiling.costs import measure_costs
from tightfit.profiling.output_strides import corrections, layouts_of, with_layouts
from tightfit.profiling.signatures import SignatureTable

ATEN: Any = torch.ops.aten
HOST = torch.device("cpu")


def table_of(*calls: tuple[Any, Tensor]) -> SignatureTable:
    table = SignatureTable()
    for func, x in calls:
        table.add(func, (x,), {})
    return table


def said_to_be_on(device: str, x: Tensor) -> Any:
    return layouts_of(torch.empty_like(x, device=device), ())


def test_what_reads_a_misplaced_result_waits_for_the_next_fake_run() -> None:
    a, b = torch.ones(3), torch.ones(5)
    table = table_of((ATEN.sin.default, a), (ATEN.exp.default, a), (ATEN.sin.default, b))
    said = {0: said_to_be_on("meta", a), 1: said_to_be_on("cpu", a), 2: said_to_be_on("meta", b)}
    cache = NoCache()
    costs = measure_costs(table.calls, HOST, cache, fake_layouts=said)
    assert set(costs.layouts) == {0, 2}  # both that have to be corrected, at once
    keys = table.keys
    wrong = corrections({keys[i]: said[i] for i in said}, {keys[i]: costs.layouts[i] for i in costs.layouts})
    assert set(wrong) == {keys[0], keys[2]}
    again = measure_costs(
        table.calls, HOST, cache, fake_layouts={i: said_to_be_on("cpu", x) for i, x in enumerate((a, a, b))}
    )
    assert set(again.layouts) == {0, 1, 2}


def test_so_it_does_where_the_cache_knows_what_misplaces_its_result() -> None:
    class Known(CostCache):
        def __init__(self) -> None:
            self._known: dict[str, Cost] = {}

        def get(self, call: Any) -> Cost | None:
            return Cost(1.0, 0, said_to_be_on("cpu", torch.ones(3))) if call.func is ATEN.sin.default else None

        def put(self, call: Any, cost: Cost) -> None:
            raise AssertionError(f"{call.func} was run")

        def save(self) -> None:
            pass

    a = torch.ones(3)
    table = table_of((ATEN.sin.default, a), (ATEN.exp.default, a))
    costs = measure_costs(
        table.calls, HOST, Known(), fake_layouts={0: said_to_be_on("meta", a), 1: said_to_be_on("cpu", a)}
    )
    assert set(costs.layouts) == {0}


def test_a_corrected_result_is_where_the_real_kernel_puts_it() -> None:
    with fake_mode():
        result = (torch.empty(4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
        real = layouts_of((torch.empty(4, device="meta"), torch.empty(2, dtype=torch.int64)), ())
        moved = with_layouts(result, real, torch.device("meta"))
    assert [tensor.device.type for tensor in moved] == ["meta", "cpu"]
    assert layouts_of(moved, ()) == real
