"""Say what each region saves and costs, and leave regions alone that do not pay.

See https://github.com/pytorch/pytorch/issues/193193 and https://github.com/pytorch/pytorch/issues/143176.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tests.promises.training import adamw
from tightfit.cli.main import main
from tightfit.records import KeptValue, Plan
from tightfit.replay.session import Session
from tightfit.report.plan_table import format_table, plan_rows
from tightfit.solver.solver import Solver

BATCH = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(torch.tanh(self.up(x))))


class Uneven(nn.Module):
    """Large blocks, of which a budget may want something, and a tail whose savings are tiny or cannot be dropped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.ModuleList(Block(32, 256) for _ in range(3))
        self.small = nn.ModuleList(Block(32, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.large:
            x = block(x)
        for block in self.small:
            x = block(x)
        return x.pow(2).mean()


@pytest.fixture(scope="module")
def solver() -> Solver:
    model = Uneven()
    return Solver(tightfit.measure(model, BATCH, optimizer=adamw(model)))


def recipe_of(plan: Plan, path: str) -> int:
    (region,) = (region for region in plan.regions if region.key == f"{path}#0")
    return region.recipe


def test_a_region_whose_replay_saves_nothing_at_the_peak_is_left_alone(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just below the plain peak some block must give way; the small ones have nothing that would help."""
    plain = solver.plain(0).predicted_peak_bytes
    plan = solver.solve(plain - 1024)
    assert any(recipe_of(plan, f"large.{n}") >= 0 for n in range(3))
    assert all(recipe_of(plan, f"small.{n}") == -1 for n in range(3))
    # And it is so in the run: nothing is written down there, and no mode or hook is in force.
    model = Uneven()
    active: dict[str, bool] = {}
    for path, module in model.named_modules():
        if path.count(".") == 1:
            module.register_forward_pre_hook(lambda *_, path=path: None)
            inner = module.up
            inner.register_forward_hook(
                lambda *_, path=path: active.__setitem__(path, isinstance(top_mode(), Session))  # type: ignore[func-returns-value]  # a statement in a lambda
            )
    with tightfit.apply(model, plan) as applied:
        applied.loss(model, BATCH).backward()
    assert active == {
        **{f"large.{n}": recipe_of(plan, f"large.{n}") >= 0 for n in range(3)},
        **{f"small.{n}": False for n in range(3)},
    }


def top_mode() -> object:
    from tightfit._torch_private.dispatch import top_dispatch_mode

    return top_dispatch_mode()


def test_each_recipe_tells_bytes_and_time_and_they_add_up(solver: Solver) -> None:
    smallest = solver.minimum_budget()[0]
    plan = solver.solve(smallest)
    recipes = [plan.recipes[region.recipe] for region in plan.regions if region.recipe >= 0]
    assert recipes
    for recipe in recipes:
        assert recipe.dropped_bytes > 0, "a region that drops nothing does not pay"
        assert recipe.replay_ms >= 0
    # Nothing but replay and the mechanism makes the step longer.
    replay_ms = sum(recipe.replay_ms for recipe in recipes)
    mechanism_ms = (solver.profile.mode_ms_per_op + 2 * solver.profile.tape_ms_per_op) * len(solver.profile.ops)
    added_ms = plan.predicted_step_ms - plan.plain_step_ms
    assert replay_ms <= added_ms + 1e-6
    assert added_ms <= replay_ms + mechanism_ms + 1e-6


def test_what_is_dropped_is_really_not_held(solver: Solver) -> None:
    """The bytes that a plan reports as dropped are those that a forward holds less, by the profiler."""
    from tests.replay.helpers import retained_bytes

    plan = solver.full(2**40)
    dropped = sum(plan.recipes[r.recipe].dropped_bytes for r in plan.regions if r.recipe >= 0)
    model = Uneven()
    model(BATCH).backward()  # whatever is allocated once is now
    plain_loss, plain = retained_bytes(lambda: model(BATCH))
    with tightfit.apply(model, plan) as applied:
        applied.loss(model, BATCH).backward()
        planned_loss, planned = retained_bytes(lambda: applied.loss(model, BATCH))
    assert torch.equal(plain_loss, planned_loss)
    assert plain - planned == dropped > 0


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


TINY = ["--model", "gpt-tiny", "--batch-size", "4"]


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--memory", "2800KiB", "--output", "plan.json"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    plan = Plan.load("plan.json")
    recomputed = [region.key.partition("#")[0] for region in plan.regions if region.recipe >= 0]
    first, last = lines.index(["regions", "calls", "saved", "added"]) + 1, lines.index(["written", "to", "plan.json"])
    table = lines[first:last]
    assert recomputed
    assert all(any(path in " ".join(line) for line in table) for path in recomputed)
    assert ["nothing", "dropped", str(len(plan.regions) - len(recomputed))] in table
    # The lines add up to the plan's own figures.
    (whole,) = (line for line in table if line[0] == "all")
    assert whole[1] == str(len(recomputed))
    assert float(whole[-2]) == round(plan.predicted_step_ms - plan.plain_step_ms, 2)
    parts = [float(line[-2]) for line in table if line[-1] == "ms" and line[0] != "all"]
    assert sum(parts) == pytest.approx(float(whole[-2]), abs=0.005 * len(table))


def test_what_is_kept_is_shown_with_its_reason(solver: Solver) -> None:
    plan = solver.solve(solver.minimum_budget()[0])
    number = next(region.recipe for region in plan.regions if region.recipe >= 0)
    kept = KeptValue(op="mine.kernel.default", reason="mine operations are not replayed", nbytes=2048)
    recipes = list(plan.recipes)
    recipes[number] = replace(recipes[number], kept_for_safety=(kept,))
    calls = sum(region.recipe == number for region in plan.regions)
    table = format_table(replace(plan, recipes=tuple(recipes)))
    assert f"{calls * 2}.0 KiB of mine.kernel.default (mine operations are not replayed)" in table
    (row,) = (row for row in plan_rows(replace(plan, recipes=tuple(recipes))) if row["kept_for_safety"])
    assert row["dropped_bytes"] == calls * plan.recipes[number].dropped_bytes


def test_nothing_recomputed_has_no_table(solver: Solver) -> None:
    assert format_table(solver.plain(2**40)) == ""


def test_a_short_table_has_the_same_sums(solver: Solver) -> None:
    plan = solver.full(2**40)
    whole, short = format_table(plan), format_table(plan, most=2)
    assert len(short.splitlines()) < len(whole.splitlines())
    assert "others" in short

    def last(text: str, name: str) -> str:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
        return " ".join(line.split())

    for name in ("all", "recording"):
        assert last(whole, name) == last(short, name)
