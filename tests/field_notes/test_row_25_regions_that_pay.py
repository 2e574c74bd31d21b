"""Row 25: each region says what it saves and what that costs; regions that do not pay are left alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import recollect
from recollect.cli.main import main
from recollect.records import Plan
from recollect.replay.session import Session
from recollect.solve import Solver
from tests.field_notes.training import adamw

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
    return Solver(recollect.measure(model, BATCH, optimizer=adamw(model)))


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
                lambda *_, path=path: active.__setitem__(path, isinstance(top_mode(), Session))  # type: ignore[func-returns-value]
            )
    with recollect.apply(model, plan) as applied:
        applied.loss(model, BATCH).backward()
    assert active == {
        **{f"large.{n}": recipe_of(plan, f"large.{n}") >= 0 for n in range(3)},
        **{f"small.{n}": False for n in range(3)},
    }


def top_mode() -> object:
    from recollect._torch_private import top_dispatch_mode

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
    with recollect.apply(model, plan) as applied:
        applied.loss(model, BATCH).backward()
        planned_loss, planned = retained_bytes(lambda: applied.loss(model, BATCH))
    assert torch.equal(plain_loss, planned_loss)
    assert plain - planned == dropped > 0


TINY = ["--model", "gpt-tiny", "--batch-size", "4"]


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--memory", "2800KiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = (n for n, line in enumerate(lines) if line.split()[:1] == ["regions"])
    assert lines[header].split() == ["regions", "calls", "saved", "added"]
    assert any("blocks." in line and "KiB" in line and "ms" in line for line in lines[header + 1 :])
    assert main(["plan", *TINY, "--memory", "2800KiB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(row["calls"] for row in document["recipes"]) == document["planned_regions"]
    for row in document["recipes"]:
        assert row["dropped_bytes"] > 0
        assert row["replay_ms"] >= 0
