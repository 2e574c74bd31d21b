"""Installing a plan touches an instance-level forward and nothing else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tests.replay.helpers import differences, snapshot
from tightfit import Plan, PlanMismatch, UnsupportedInput
from tightfit._torch_private.dispatch import dispatch_depth
from tightfit.solver.solver import full_plan, plain_plan
from tightfit.step.step import Step

Tensor = torch.Tensor


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.depths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.depths.append(dispatch_depth())
        return x + self.down(nn.functional.dropout(nn.functional.gelu(self.up(self.norm(x))), 0.1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).log_softmax(-1).pow(2).mean()


BATCH = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return full_plan(tightfit.measure(Net(), BATCH, loss=loss_of), 2**30)


@pytest.fixture
def model() -> Net:
    return Net()


@pytest.fixture
def applied(model: Net, plan: Plan) -> Iterator[tightfit.Applied]:
    with tightfit.apply(model, plan) as applied:
        yield applied


def step(model: nn.Module) -> dict[str, Any]:
    torch.manual_seed(1)
    model.zero_grad()
    loss = loss_of(model, BATCH)
    loss.backward()
    return snapshot(model, loss)


def test_nothing_but_an_instance_level_forward(model: Net, plan: Plan) -> None:
    before = {name: (type(m), repr(m), set(vars(m))) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    with tightfit.apply(model, plan) as applied:
        assert applied.installed
        assert list(model.state_dict()) == keys
        for name, module in model.named_modules():
            kind, text, attributes = before[name]
            assert type(module) is kind
            assert repr(module) == text
            assert set(vars(module)) - attributes <= {"forward"}
        assert isinstance(model, Net)
        wrapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert wrapped == ["", "layers.0", "layers.1", "layers.2"]
    assert not any("forward" in vars(m) for m in model.modules())
    assert not applied.installed


def test_planned_step_equals_plain_and_replays(model: Net, plan: Plan) -> None:
    plain = step(model)
    with tightfit.apply(model, plan) as applied:
        assert differences(plain, step(model)) == []
        assert applied.statistics.replayed_ops > 0
        with applied.paused():
            applied.statistics.reset()
            assert differences(plain, step(model)) == []
            assert applied.statistics.taped_ops == 0
    assert differences(plain, step(model)) == []


def test_the_loss_is_planned_when_it_runs_through_applied(model: Net, plan: Plan) -> None:
    torch.manual_seed(1)
    plain = loss_of(model, BATCH)
    with tightfit.apply(model, plan, step=Step(loss=loss_of)) as applied:
        torch.manual_seed(1)
        assert torch.equal(applied.loss(model, BATCH), plain)
        assert (applied.statistics.unplanned_calls, applied.statistics.mismatches) == (0, 0)


def test_user_hooks_run_once_and_outside_the_region(model: Net, applied: tightfit.Applied) -> None:
    seen: list[tuple[str, int]] = []
    layer = model.layers[1]
    layer.register_forward_pre_hook(lambda *_: seen.append(("before", dispatch_depth())))
    layer.register_forward_hook(lambda *_: seen.append(("after", dispatch_depth())))
    outside: list[int] = []
    model.register_forward_pre_hook(lambda *_: outside.append(dispatch_depth()))
    model.register_forward_hook(lambda *_: outside.append(dispatch_depth()))
    step(model)
    assert outside == [0, 0]
    assert [name for name, _ in seen] == ["before", "after"]
    assert layer.depths == [1]


def test_a_deep_copy_is_unplanned_and_uses_its_own_weights(model: Net, applied: tightfit.Applied) -> None:
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    applied.statistics.reset()
    fresh = Net()
    fresh.load_state_dict(average.state_dict())
    assert differences(step(fresh), step(average)) == []
    assert applied.statistics.taped_ops == 0
    assert average.layers[0].depths == [0]
    again = copy.deepcopy(average)  # a copy of a copy, and a plan of its own
    with tightfit.apply(again, applied.plan) as second:
        assert differences(step(fresh), step(again)) == []
        assert second.statistics.replayed_ops > 0
    assert applied.statistics.taped_ops == 0


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_model_is_unplanned(how: str, model: Net, applied: tightfit.Applied) -> None:
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    applied.statistics.reset()
    result = step(loaded)
    assert applied.statistics.taped_ops == 0
    applied.remove()
    assert differences(step(model), result) == []
    assert loaded.layers[0].forward.__self__ is loaded.layers[0]


def test_state_dict_round_trip_with_weights_only(model: Net, applied: tightfit.Applied) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    Net().load_state_dict(torch.load(buffer, weights_only=True))


class Patched(Net):
    """Somebody else put an instance-level forward there first."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.forward = layer.forward  # type: ignore[method-assign]  # as users do it


def test_a_forward_that_was_there_before_is_restored() -> None:
    model = Patched()
    before = [layer.forward for layer in model.layers]
    plan = full_plan(tightfit.measure(model, BATCH, loss=loss_of), 2**30)
    assert [vars(layer)["forward"] for layer in model.layers] == before
    plain = step(model)
    with tightfit.apply(model, plan):
        assert differences(plain, step(model)) == []
    assert [vars(layer)["forward"] for layer in model.layers] == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_grad_the_call_is_direct(context: Any, training: bool, model: Net, applied: tightfit.Applied) -> None:
    model.train(training)
    with context(), applied.step():
        model(BATCH)
    assert [layer.depths for layer in model.layers] == [[0]] * 3
    assert applied.statistics.taped_ops == 0


def test_removed_with_a_backward_pending(model: Net, plan: Plan) -> None:
    plain = step(model)
    torch.manual_seed(1)
    model.zero_grad()
    applied = tightfit.apply(model, plan)
    loss = loss_of(model, BATCH)
    applied.remove()
    applied.remove()  # harmless
    loss.backward()
    assert applied.statistics.replayed_ops > 0
    assert differences(plain, snapshot(model, loss)) == []


def test_two_plans_on_one_model_are_refused(model: Net, applied: tightfit.Applied, plan: Plan) -> None:
    with pytest.raises(UnsupportedInput, match="installed already"):
        tightfit.apply(model, plan)
    with pytest.raises(UnsupportedInput, match="installed already"):
        tightfit.apply(model.layers[0], plan)
    applied.remove()
    tightfit.apply(model, plan).remove()


def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    other = Net()
    other.head = nn.Linear(8, 5)
    with pytest.raises(PlanMismatch, match="another model"):
        tightfit.apply(other, plan)
    frozen = Net()
    frozen.head.weight.requires_grad_(False)
    with pytest.raises(PlanMismatch, match="another model"):
        tightfit.apply(frozen, plan)


def test_a_plan_with_unknown_modules_is_refused_and_leaves_nothing_behind(model: Net, plan: Plan) -> None:
    strange = replace(plan, region_paths=(*plan.region_paths, "layers.9"))
    with pytest.raises(PlanMismatch, match=r"layers\.9"):
        tightfit.apply(model, strange)
    assert not any("forward" in vars(m) for m in model.modules())


def test_what_cannot_be_planned_is_refused(plan: Plan) -> None:
    with pytest.raises(UnsupportedInput, match="DataParallel"):
        tightfit.apply(nn.DataParallel(Net()), plan)
    with pytest.raises(UnsupportedInput, match=r"torch\.compile"):
        tightfit.apply(torch.compile(Net(), backend="eager"), plan)
    in_place = Net()
    in_place.layers[0].compile(backend="eager")
    with pytest.raises(UnsupportedInput, match=r"layers\.0.* was compiled with torch\.compile after the plan"):
        tightfit.apply(in_place, plan)
    with pytest.raises(UnsupportedInput, match=r"not a torch\.nn\.Module"):
        tightfit.apply(lambda x: x, plan)  # type: ignore[arg-type]  # the mistake that is told


def test_a_plain_plan_installs_nothing(model: Net) -> None:
    profile = tightfit.measure(model, BATCH, loss=loss_of)
    with tightfit.apply(model, plain_plan(profile, 2**30)) as applied:
        assert not applied.installed
        step(model)
    assert applied.statistics.taped_ops == 0


def test_a_batch_of_another_shape_is_handled_and_counted(model: Net, applied: tightfit.Applied) -> None:
    """The plan is keyed by operations, not shapes: another batch size follows it, another rank leaves it."""
    for batch in (torch.randn(7, 8), torch.randn(2, 3, 8)):
        gradients = []
        for paused in (True, False):
            torch.manual_seed(2)
            model.zero_grad()
            if paused:
                with applied.paused():
                    loss_of(model, batch).backward()
            else:
                with applied.step():
                    loss = loss_of(model, batch)
                loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_plan_s_recipe_meets_other_operations(model: Net, applied: tightfit.Applied) -> None:
    """A stale plan: the module computes something else now."""
    step(model)
    for layer in model.layers:
        layer.norm = nn.Identity()
    applied.statistics.reset()
    with applied.step():
        loss_of(model, BATCH)
    assert applied.statistics.mismatches >= 3
    torch.manual_seed(1)
    replayed = step(model)
    with applied.paused():
        assert differences(step(model), replayed) == []
