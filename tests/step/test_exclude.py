"""`exclude=` names modules by themselves or by patterns, and leaves them untouched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.support.chains import ResidualMLP
from tightfit import PlanMismatch, UnsupportedInput
from tightfit.replay.replayer import Replayer
from tightfit.replay.values import Ref
from tightfit.solver.solver import full_plan
from tightfit.step.exclude import excluded_paths

BATCH = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> ResidualMLP:
    torch.manual_seed(0)
    return ResidualMLP(3)


@pytest.mark.parametrize(
    ("exclude", "paths"),
    [
        ((), ()),
        ("blocks.1", ("blocks.1",)),
        ("blocks.*.up", ("blocks.0.up", "blocks.1.up", "blocks.2.up")),
        (["blocks.[02]", "head"], ("blocks.0", "blocks.2", "head")),
        ("blocks*", ("blocks",)),  # what is inside goes without saying
    ],
)
def test_patterns(exclude: Any, paths: tuple[str, ...], model: ResidualMLP) -> None:
    assert excluded_paths(model, exclude) == paths


def test_a_module_counts_wherever_it_is(model: ResidualMLP) -> None:
    model.again = model.blocks[1].up
    assert excluded_paths(model, model.blocks[1].up) == ("again", "blocks.1.up")
    assert excluded_paths(model, "again") == ("again", "blocks.1.up")
    assert excluded_paths(model, [model.head, "blocks.0"]) == ("blocks.0", "head")
    model.group = nn.ModuleList([model.blocks[2]])
    assert excluded_paths(model, "group") == ("blocks.2", "group")


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("block.*.up", r"'block\.\*\.up' matches no module of ResidualMLP\. .*paths like it are: .*blocks\.\d\.up"),
        (nn.Linear(1, 1), "a Linear that is no module of ResidualMLP"),
        ("", "the model itself"),
        (3, "a int that is no module of ResidualMLP"),
    ],
)
def test_what_names_nothing_is_an_error(exclude: Any, message: str, model: ResidualMLP) -> None:
    for verb in (tightfit.measure, tightfit.fit):
        with pytest.raises(UnsupportedInput, match=message):
            verb(model, BATCH, exclude=exclude)  # type: ignore[operator]  # the two have these arguments in common


class Wide(nn.Module):
    """A block whose matrix products are known by their width, 24."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 24), nn.Sequential(nn.GELU()), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.sigmoid(self.act(self.up(x.exp()))))  # type: ignore[no-any-return]  # calls of modules are not annotated


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operations that were recomputed, with the sizes of what they read."""
    seen: list[str] = []
    execute = Replayer._execute

    def note(self: Replayer, op: Any, *rest: Any) -> Any:
        seen.append(f"{op.func} {[tuple(one.size) for one in op.args if isinstance(one, Ref)]}")
        return execute(self, op, *rest)

    monkeypatch.setattr(Replayer, "_execute", note)
    return seen


@pytest.mark.parametrize("exclude", [(), "blocks.1", "blocks.*", "blocks.1.[ua]*"])
@pytest.mark.parametrize("follows", ["the plan", "other operations", "no plan"])
def test_nothing_inside_is_recomputed_or_replaced(
    exclude: str, follows: str, model: ResidualMLP, recomputed: list[str]
) -> None:
    model.blocks[1] = Wide()
    paths = excluded_paths(model, exclude)
    plan = full_plan(tightfit.measure(model, BATCH, exclude=exclude), 2**30)
    assert plan.excluded == paths
    batch = BATCH
    if follows == "other operations":
        model.blocks[1].act.append(nn.Tanh())
    elif follows == "no plan":
        batch = torch.randn(7, 8)
    with tightfit.apply(model, plan) as applied:
        inside = [below for path in paths for below in model.get_submodule(path).modules()]
        assert not any("forward" in vars(module) for module in inside)
        assert "forward" in vars(model)
        model.zero_grad()
        applied.loss(model, batch).backward()
        assert any("addmm.default [(24,)" in op for op in recomputed) is (not exclude)
        assert any("addmm.default [(16,)" in op for op in recomputed) is (exclude != "blocks.*")
        gradients = [parameter.grad for parameter in model.parameters()]
        with applied.paused():
            model.zero_grad()
            applied.loss(model, batch).backward()
        assert all(
            torch.equal(one, parameter.grad)
            for one, parameter in zip(gradients, model.parameters(), strict=True)
            if one is not None and parameter.grad is not None
        )


def test_a_plan_for_one_exclude_is_not_used_for_another(model: ResidualMLP) -> None:
    profile = tightfit.measure(model, BATCH, exclude="blocks.1")
    with tightfit.fit(model, BATCH, profile=profile, exclude=model.blocks[1], grad_checkpoint="full") as same:
        assert same.profile is not None
        assert same.profile.events is profile.events  # not measured again
        assert same.plan.excluded == ("blocks.1",)
        assert same.verdict is not None
        assert same.verdict.ok
    with tightfit.fit(model, BATCH, profile=profile, grad_checkpoint="full") as other:
        assert other.plan.excluded == ()
        assert "blocks.1" in other.plan.region_paths
    plan = tightfit.solve(profile, 2**30)
    assert tightfit.verify(model, BATCH, plan).ok
    assert tightfit.verify(model, BATCH, plan, exclude="blocks.1").ok
    with pytest.raises(PlanMismatch, match=r"blocks\.1 excluded, and exclude names blocks\.0"):
        tightfit.verify(model, BATCH, plan, exclude="blocks.0")
    with pytest.raises(PlanMismatch, match="blocks\\.9"):
        tightfit.apply(model, replace(plan, excluded=("blocks.9",)))
