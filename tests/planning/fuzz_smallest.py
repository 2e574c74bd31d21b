"""Random modules and their smallest budgets: the number that is named is accepted and kept, one byte less is refused.

python -m tests.planning.fuzz_smallest --count 200 --seed 1
python -m tests.planning.fuzz_smallest --replay '{"code": ...}'      # one failing program again, as it was printed
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch

import tightfit
from tests.replay.fuzz import for_each_module, measured_peak, silence
from tests.replay.programs import Program, loss_of
from tests.replay.steps import steps
from tests.support import fixed_costs
from tightfit import BudgetInfeasible

#: Training steps whose peak is measured under the smallest budget.
STEPS = 3


@dataclass
class Found:
    """What became of one module."""

    spec: dict[str, Any]
    named_bytes: int = 0
    plain_bytes: int = 0
    refused_by_plain: bool = False
    problem: str = ""


def program(spec: dict[str, Any]) -> Program:
    return Program([tuple(entry) for entry in spec["code"]], spec["rows"], spec["columns"], spec["form"])


def fitted(spec: dict[str, Any], budget: int | str) -> tuple[Program, tightfit.Applied]:
    model = program(spec)
    return model, tightfit.fit(model, model.batch, loss=loss_of, budget=budget)


def refusal(spec: dict[str, Any], budget: int) -> int:
    """The number that is named when a budget is refused; 0 if it is accepted."""
    try:
        fitted(spec, budget)[1].remove()
    except BudgetInfeasible as infeasible:
        return infeasible.required_bytes
    return 0


def check(spec: dict[str, Any]) -> Found:
    """Have the smallest budget of one module named, and try it."""
    found = Found(spec)
    model = program(spec)
    if isinstance(steps(model, model.batch, count=1), str):
        found.refused_by_plain = True
        return found
    try:
        found.problem = _problem(spec, found)
    except Exception:
        found.problem = traceback.format_exc()
    return found


def _problem(spec: dict[str, Any], found: Found) -> str:
    named = found.named_bytes = refusal(spec, 1)
    if not named:
        return "a budget of one byte is accepted"
    try:
        model, applied = fitted(spec, named)
    except BudgetInfeasible as infeasible:
        return f"{named} was named, and {infeasible.required_bytes} is asked for"
    with applied:
        found.plain_bytes = applied.plan.plain_peak_bytes
        random_state = torch.get_rng_state()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        peaks = []
        for _ in range(STEPS):  # of one state: where sizes depend on the data, other buffers make another step
            torch.set_rng_state(random_state)
            model.load_state_dict(state)
            peaks.append(measured_peak(model, applied))
    if max(peaks) > named:
        return f"{named} was named and accepted, and {max(peaks)} taken"
    below = refusal(spec, named - 1)
    if below != named:
        return f"{named} was named, and one byte less is {f'refused for {below}' if below else 'accepted'}"
    model = program(spec)
    tightfit.solve(tightfit.measure(model, model.batch, loss=loss_of), named)
    return ""


def run(count: int, number: int) -> list[Found]:
    """`count` modules drawn from `number`, in this process."""
    results: list[Found] = []
    begin = time.monotonic()

    def look(spec: dict[str, Any]) -> None:
        results.append(check(spec))
        if results[-1].problem:
            print(f"FAILED {json.dumps(spec)}\n  {results[-1].problem}", flush=True)
        if len(results) % 20 == 0:
            print(f"{len(results)} modules in {time.monotonic() - begin:.0f} s", flush=True)

    for_each_module(number, count, look)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="modules to run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", help="a program as it was printed")
    options = parser.parse_args()
    silence()
    if options.replay:
        torch.set_num_threads(1)
        fixed_costs.install()
        results = [check(json.loads(options.replay))]
        print(results[0].problem)
    else:
        results = run(options.count, options.seed)
    failed = sum(bool(one.problem) for one in results)
    refused = sum(one.refused_by_plain for one in results)
    saved = sum(0 < one.named_bytes < one.plain_bytes for one in results)
    print(
        f"smallest budgets: {len(results)} modules, {len(results) - failed - refused} named a number that is accepted "
        f"and kept, and one byte less is refused ({saved} below plain); {refused} refused by plain; {failed} failed"
    )
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
