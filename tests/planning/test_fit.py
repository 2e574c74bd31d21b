"""`fit`: budgets that can be read, repaired, or honestly refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tightfit
from tests.suite import build
from tightfit import BudgetInfeasible, UnsupportedInput
from tightfit._torch_private.dispatch import tree_leaves
from tightfit.device import device_for
from tightfit.planning import search as planner
from tightfit.planning.trial_repair import try_plan, without_refused
from tightfit.profiling.unseen_writes import UnseenWrites
from tightfit.records import Plan, Profile
from tightfit.replay.tape import Tape
from tightfit.replay.write_watch import WriteWatch
from tightfit.solver.solver import Solver, full_plan, plain_plan, solver_of
from tightfit.verification.trial import Outcome, Trial

Tensor = torch.Tensor
MIB = 2**20


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


BATCH = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def peaks() -> tuple[int, int]:
    """(smallest, plain)"""
    with tightfit.fit(Net(), BATCH) as applied:
        plain = applied.plan.plain_peak_bytes
        assert applied.plan.is_plain
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(Net(), BATCH, budget=1000)
    return caught.value.required_bytes, plain


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7])
def test_a_budget_is_kept_and_proved(part: float, peaks: tuple[int, int]) -> None:
    smallest, plain = peaks
    budget = smallest + int(part * (plain - smallest))
    model = Net()
    with tightfit.fit(model, BATCH, budget=budget, reference_budget_bytes=2**40) as applied:
        verdict = applied.verdict
        assert verdict is not None
        assert verdict.ok is True
        assert verdict.measured_peak_bytes <= budget < verdict.plain_peak_bytes
        assert applied.plan.predicted_peak_bytes <= budget
        assert applied.installed
        assert applied.profile is not None


def test_the_smallest_budget_is_named_and_one_byte_less_is_refused(peaks: tuple[int, int]) -> None:
    smallest, plain = peaks
    assert smallest < plain
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(Net(), BATCH, budget=smallest - 1)
    assert (caught.value.required_bytes, caught.value.budget_bytes) == (smallest, smallest - 1)
    assert caught.value.where
    assert str(smallest) in str(caught.value)
    model = Net()
    with pytest.raises(BudgetInfeasible):
        tightfit.fit(model, BATCH, budget=1)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("grad_checkpoint", ["full", "off"])
def test_full_and_off(grad_checkpoint: Any, peaks: tuple[int, int]) -> None:
    with tightfit.fit(Net(), BATCH, grad_checkpoint=grad_checkpoint) as applied:
        assert applied.installed is (grad_checkpoint == "full")
        assert applied.verdict is not None
        assert applied.verdict.ok is True
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(Net(), BATCH, budget=10_000, grad_checkpoint=grad_checkpoint)
    assert grad_checkpoint == "full" or caught.value.required_bytes == peaks[1]


def test_a_notebook_shows_plan_and_verdict() -> None:
    with tightfit.fit(Net(), BATCH) as applied:
        shown = applied._repr_html_()
    assert applied.verdict is not None
    assert shown == applied.plan._repr_html_() + applied.verdict._repr_html_()


def test_a_share_of_the_device_s_memory() -> None:
    whole = device_for(torch.device("cpu")).capacity_bytes()
    with tightfit.fit(Net(), BATCH, budget="75%") as applied:
        assert applied.plan.budget_bytes == int(whole * 0.75)
        assert applied.plan.is_plain


@pytest.mark.parametrize("budget", ["much", "", "-3GiB", "0", 0, -1, "nan%", "200%", "1e30GiB", "0%", "GiB", "inf%"])
def test_budgets_that_cannot(budget: Any) -> None:
    with pytest.raises(UnsupportedInput) as caught:
        tightfit.fit(Net(), BATCH, budget=budget)
    assert str(budget) in str(caught.value) or "larger" in str(caught.value)


def test_an_unknown_grad_checkpoint() -> None:
    with pytest.raises(UnsupportedInput, match="'sometimes' is not a choice"):
        tightfit.fit(Net(), BATCH, grad_checkpoint="sometimes")  # type: ignore[arg-type]  # the mistake that is told


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Profile, Plan]]:
    """Every profile that `fit` solved, with the plan."""
    found: list[tuple[Profile, Plan]] = []
    right = planner._choose

    def choose(solver: Solver, *rest: Any) -> Plan:
        plan = right(solver, *rest)
        found.append((solver.profile, plan))
        return plan

    monkeypatch.setattr(planner, "_choose", choose)
    return found


def test_a_run_above_the_budget_is_repaired(
    peaks: tuple[int, int], solved: list[tuple[Profile, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is made to forget so much that the plain step seems to fit: the first trial run exceeds the budget
    whatever this machine's op times are, a later one keeps it.
    """
    budget = sum(peaks) // 2
    forgotten = peaks[1] - budget
    measure = planner.measure_together
    monkeypatch.setattr(
        planner, "measure_together", lambda *a, **k: replace(measure(*a, **k), correction_bytes=-forgotten)
    )
    with tightfit.fit(Net(), BATCH, budget=budget, reference_budget_bytes=2**40) as applied:
        assert len(solved) >= 2
        assert solved[0][0].correction_bytes == -forgotten < solved[-1][0].correction_bytes
        assert applied.plan is solved[-1][1]
        assert applied.verdict is not None
        assert applied.verdict.ok is True
        assert applied.verdict.measured_peak_bytes <= budget


def test_a_budget_that_repair_cannot_reach_is_infeasible(
    peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Trial.run_self_checked

    def above(self: Trial, applied: tightfit.Applied, steps: int = 1) -> Outcome:
        return replace(right(self, applied, steps), peak_bytes=applied.plan.budget_bytes + MIB)

    monkeypatch.setattr(Trial, "run_self_checked", above)
    model = Net()
    with pytest.raises(BudgetInfeasible):
        tightfit.fit(model, BATCH, budget=sum(peaks) // 2)
    assert not any("forward" in vars(m) for m in model.modules())


def test_running_out_of_memory_in_the_trial_run_is_repaired(
    peaks: tuple[int, int], solved: list[tuple[Profile, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Trial.run_self_checked
    failed = False

    def once(self: Trial, applied: tightfit.Applied, steps: int = 1) -> Outcome:
        nonlocal failed
        if not failed:
            failed = True
            raise torch.OutOfMemoryError("out of memory")
        return right(self, applied, steps)

    monkeypatch.setattr(Trial, "run_self_checked", once)
    with tightfit.fit(Net(), BATCH, budget=peaks[1] + 2 * MIB, reference_budget_bytes=2**40):
        assert len(solved) == 2
        assert solved[1][0].correction_bytes > 0


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_where_the_device_has_no_memory_for_the_plain_step_regions_are_compared(
    peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "run_plain", no_memory)
    with tightfit.fit(Net(), BATCH, budget=sum(peaks) // 2, reference_budget_bytes=2**40) as applied:
        assert applied.verdict is not None
        assert (applied.verdict.method, applied.verdict.ok) == ("per-region", True)
        assert applied.verdict.plain_peak_source == "predicted"


@pytest.mark.parametrize("place", ["Trial.times_ms", "search.measure_together"])
def test_a_lack_of_memory_elsewhere_is_told_in_terms_of_the_budget(
    place: str, peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "tightfit.verification.trial" if place.startswith("Trial") else "tightfit.planning"
    monkeypatch.setattr(f"{module}.{place}", no_memory)
    model = Net()
    with pytest.raises(BudgetInfeasible, match="no more memory") as caught:
        tightfit.fit(model, BATCH, budget=sum(peaks) // 2)
    assert caught.value.required_bytes > caught.value.budget_bytes
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert not any("forward" in vars(module) for module in model.modules())


class Raw(torch.autograd.Function):
    """Writes behind the dispatcher's back into a buffer of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out.numpy()[:] = np.sin(x.detach().numpy())
        doubled = out * 2
        ctx.save_for_backward(out, doubled)
        return doubled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        out, doubled = ctx.saved_tensors
        return grad * out * doubled


class RawNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + Raw.apply(layer(x))
        return x.pow(2).mean()


def test_what_a_self_check_refuses_is_kept_by_the_next_plan(
    solved: list[tuple[Profile, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for a kernel that got the address in a way that nobody watches, and began to write after measuring.
    monkeypatch.setattr("tightfit.operators.escaped_memory._WATCHED", frozenset())
    monkeypatch.setattr(UnseenWrites, "look_at", lambda *_: None)
    with tightfit.fit(RawNet(), BATCH, grad_checkpoint="full", reference_budget_bytes=2**40) as applied:
        assert len(solved) == 2
        assert not any("self-check" in op.keep_reason for op in solved[0][0].ops)
        assert any("self-check" in op.keep_reason for op in solved[1][0].ops)
        assert applied.verdict is not None
        assert applied.verdict.ok is True
        assert applied.verdict.mismatches == 0


STAGING = np.ones(64, dtype=np.float32)


class StagingNet(Net):
    """A constant that NumPy overwrites after its last use: replay would read the wrong one."""

    def forward(self, x: Tensor) -> Tensor:
        STAGING[:] = 1
        for layer in self.layers:
            x = x + layer(x) * torch.from_numpy(STAGING).exp().sin()
        STAGING[:] = 9
        return x.pow(2).mean()


def test_a_replay_that_a_self_check_found_wrong_in_backward_is_kept_by_the_next_plan() -> None:
    with tightfit.fit(StagingNet(), BATCH, grad_checkpoint="full", reference_budget_bytes=2**40) as applied:
        assert applied.verdict is not None
        assert (applied.verdict.ok, applied.verdict.mismatches) == (True, 0)
        assert applied.installed


def test_a_model_that_computes_something_else_than_was_measured_is_measured_for_real(
    solved: list[tuple[Profile, Plan]],
) -> None:
    class Suspicious(Net):
        def forward(self, x: Tensor) -> Tensor:
            loss = super().forward(x.sin() if type(x) is Tensor else x)
            return loss + (loss.cos().exp().tanh().sigmoid() if type(x) is Tensor else 0)

    with tightfit.fit(Suspicious(), BATCH, grad_checkpoint="full", reference_budget_bytes=2**40) as applied:
        assert [profile.method for profile, _ in solved] == ["fake", "real"]
        assert applied.verdict is not None
        assert applied.verdict.ok is True


def test_a_failing_trial_run_leaves_the_model_unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Tape, handle: Any) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(Tape, "read", broken)
    model = Net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken"):
        tightfit.fit(model, BATCH, grad_checkpoint="full")
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_with_optimizer_accumulation_clipping_and_autocast() -> None:
    model = Net()
    optimizers = [
        torch.optim.SGD(model.layers[0].parameters(), lr=0.1),
        torch.optim.AdamW(model.layers[1:].parameters()),
    ]
    with tightfit.fit(
        model, BATCH, grad_checkpoint="full", optimizer=optimizers, accumulation_steps=2, clip_norm=1.0,
        autocast=torch.bfloat16, reference_budget_bytes=2**40,
    ) as applied:  # fmt: skip
        assert applied.verdict is not None
        assert (applied.verdict.ok, applied.verdict.mismatches) == (True, 0)
        assert applied.plan.optimizer == "SGD, AdamW"
        # A context is opened before the step begins, or inside it: both are the step that was planned.
        with torch.autocast("cpu", torch.bfloat16), applied.step(BATCH):
            loss = model(BATCH)
        loss.backward()
        with applied.step(BATCH), torch.autocast("cpu", torch.bfloat16):
            loss = model(BATCH)
        loss.backward()
        assert (applied.plans.statistics.tried, applied.plans.statistics.mismatched_steps) == (0, 0)


def test_repairs_are_logged(
    caplog: pytest.LogCaptureFixture, peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = planner.measure_together
    monkeypatch.setattr(
        planner, "measure_together", lambda *a, **k: replace(measure(*a, **k), correction_bytes=-200_000)
    )
    with caplog.at_level(logging.INFO, logger="tightfit"):
        tightfit.fit(Net(), BATCH, budget=sum(peaks) // 2, reference_budget_bytes=2**40).remove()
    assert "more than predicted" in caplog.text


def test_refusals_on_an_operation_sequence_that_was_not_measured_are_not_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The live run had more operations than the fake one: positions that it refused are not the profile's."""
    model = Net()
    step = planner.Step()
    profile = planner.measure_together(model, BATCH, step)
    plan = full_plan(profile, 2**40)
    key = profile.regions[2].key
    beyond = profile.regions[2].op_count
    right = Trial.run_self_checked

    def differs(trial: Trial, applied: tightfit.Applied, steps: int = 1) -> Outcome:
        outcome = right(trial, applied, steps)
        applied._installed.refused[key] = {0, beyond}
        return replace(outcome, mismatches=1)

    monkeypatch.setattr(Trial, "run_self_checked", differs)
    with tightfit.apply(model, plan) as applied, Trial(model, BATCH, step) as trial:
        held, repaired = try_plan(trial, applied, profile)
    assert held is None
    assert repaired.method == "real"
    assert not any(op.keep_reason.startswith("self-check") for op in repaired.ops)

    marked = without_refused(repaired, {key: {0, beyond}})
    changed = [place for place, op in enumerate(marked.ops) if op.keep_reason.startswith("self-check")]
    assert changed == [repaired.regions[2].first_op]


def test_recognising_a_batch_hands_no_memory_out(peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing that reads the batch would be replayed, and a tight budget would be exceeded."""
    exposed: list[Tensor] = []
    monkeypatch.setattr(WriteWatch, "expose", lambda self, tensor: exposed.append(tensor))
    with tightfit.fit(Net(), BATCH, budget=peaks[0]) as applied:
        applied.loss(applied._model, BATCH).backward()
    assert exposed == []


# The first needs a real step.
@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.exhaustive), "resnet"])
def test_the_models_memory_does_not_look_as_if_it_came_from_outside(name: str) -> None:
    """`numpy()` on a tensor marks its storage for good, and memory from outside is checked for writes at every step."""
    case = build(name)
    optimizers = case.optimizers()
    profile = tightfit.measure(case.model, case.batch, loss=case.loss, optimizer=optimizers)
    budget = (solver_of(profile).minimum_budget()[0] + plain_plan(profile, 0).predicted_peak_bytes) // 2
    keywords: dict[str, Any] = {"budget": budget, "loss": case.loss, "optimizer": optimizers, "profile": profile}
    with tightfit.fit(case.model, case.batch, **keywords) as applied:
        applied.loss(case.model, case.batch).backward()
    tightfit.verify(case.model, case.batch, applied.plan, loss=case.loss, optimizer=optimizers)
    parameters = list(case.model.parameters())
    tensors = [*parameters, *case.model.buffers(), *(p.grad for p in parameters), *tree_leaves(case.batch)]
    tensors += [value for one in optimizers for state in one.state.values() for value in state.values()]
    assert all(t.untyped_storage().resizable() for t in tensors if isinstance(t, torch.Tensor))


def test_a_profile_that_is_given_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    right = planner.measure_together
    monkeypatch.setattr(planner, "measure_together", lambda *a, **k: measured.append(1) or right(*a, **k))
    profile = tightfit.measure(Net(), BATCH)
    with tightfit.fit(Net(), BATCH, profile=profile) as applied:
        assert applied.profile is profile
    assert measured == []
    model = Net()
    others: list[dict[str, Any]] = [
        {"model": model, "batch": BATCH[:128]},
        {"model": Net(width=32), "batch": BATCH[:, :32]},
        {"model": model, "batch": BATCH, "optimizer": torch.optim.SGD(model.parameters())},
        {"model": model, "batch": BATCH, "accumulation_steps": 2},
    ]
    for number, other in enumerate(others, 1):
        with tightfit.fit(**other, profile=profile) as applied:
            assert applied.profile is not profile
        assert len(measured) == number
