"""A failed proof stops, what is not proven is told, and what plain does not reproduce is compared in another way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit.cli.main import main
from tightfit.errors import ProofWarning, UnsupportedInput, VerificationFailed
from tightfit.operators import pure_modules
from tightfit.planning import search
from tightfit.records import Decision, Plan, Profile
from tightfit.simulation.levers.module import can_recompute_module
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.solver import Solver
from tightfit.step.snapshot import RandomState
from tightfit.verification import marks
from tightfit.verification.trial import Outcome, Trial

BATCH = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(slots=True)
class Statistics:
    calls: int = 0


class Counting(nn.Module):
    """Counts its calls where nobody puts that back, so that it must not run a second time; what it does with the count
    differs.
    """

    all_calls = 0

    def __init__(self, what_for: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.what_for = what_for
        self.tally = [0]
        self.seen: list[Any] = []
        self.statistics = Statistics()
        self.histogram = numpy.zeros(2)
        self.generator = torch.Generator()

    @property
    def calls(self) -> int:
        return self.tally[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.what_for == "object":
            self.statistics.calls += 1
        elif self.what_for == "array":
            self.histogram += 1
        elif self.what_for == "class":
            Counting.all_calls += 1
        elif self.what_for == "generator":
            torch.rand(1, generator=self.generator)
        elif self.what_for != "global":
            self.tally[0] += 1
        hidden = torch.tanh(self.up(x))
        if self.what_for == "global":
            hidden = torch.tanh(hidden * next(_numbers))
        elif self.what_for == "scaling":
            hidden = torch.tanh(hidden * self.calls)
        elif self.what_for == "branching" and self.calls % 2:
            hidden = hidden.exp()
        elif self.what_for == "remembering":
            self.seen.append(x.detach().mean())
        return x + self.down(hidden)


class Net(nn.Module):
    def __init__(self, what_for: str = "counting") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Counting(what_for) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.pow(2).mean()


def counting_model() -> tuple[nn.Module, Any]:
    """What `tightfit train` builds."""
    return Net("scaling"), lambda model, batch: model(batch)


def lines() -> list[Tensor]:
    return [*BATCH]


def run_of(model: str) -> list[str]:
    names = [f"{__name__}:{name}" for name in (model, "lines")]
    return ["train", "--model", names[0], "--dataset", names[1], "--batch-size", "8", "--steps", "1"]


def recompute_every_module(solver: Solver, budget_bytes: int, *_: Any) -> Plan:
    index = solver.index
    regions = range(len(solver.profile.regions))
    decisions = [Decision("module") if can_recompute_module(index, region) else None for region in regions]
    assert any(decisions)
    return build_plan(index, decisions, budget_bytes)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is declared safe by mistake, and a plan makes use of that."""
    monkeypatch.setattr(pure_modules, "_pure", set(pure_modules._pure))
    tightfit.allow_recompute(Counting)
    monkeypatch.setattr(search, "_choose", recompute_every_module)


def everything(model: nn.Module) -> list[Any]:
    """All that `fit` may not change."""
    return [
        [(name, id(t), t.detach().numpy().tobytes()) for name, t in model.state_dict(keep_vars=True).items()],
        [parameter.grad for parameter in model.parameters()],
        [(sorted(vars(module)), getattr(module, "calls", 0), getattr(module, "seen", 0)) for module in model.modules()],
        [(m.statistics.calls, m.histogram.tolist()) for m in model.modules() if isinstance(m, Counting)],
        Counting.all_calls,
    ]


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize(
    ("what_for", "says"),
    [
        ("counting", r"attribute blocks\.0\.tally\[0\], .* differ from the plain step's \(in blocks\.0#0, "),
        ("remembering", r"attribute blocks\.0\.seen"),
        ("scaling", r"gradient of blocks\.0\.\S+, .* differ from the plain step's, by \S+ at most \(in blocks\.0#0, "),
        ("object", r"attribute blocks\.0\.statistics\.calls"),
        ("array", r"attribute blocks\.0\.histogram"),
        ("class", r"attribute blocks\.0\.all_calls"),
        ("generator", r"attribute blocks\.0\.generator"),
    ],
)
def test_a_block_that_counts_its_calls_and_is_declared_safe(what_for: str, says: str) -> None:
    model = Net(what_for)
    before, random_state = everything(model), RandomState()
    with pytest.raises(VerificationFailed, match=says) as caught:
        tightfit.fit(model, BATCH)
    assert everything(model) == before
    assert random_state.equals(RandomState())
    assert str(caught.value).count(". ") >= 2  # found, why, what to do
    assert "allow_recompute" in str(caught.value)
    verdict = caught.value.verdict
    assert verdict is not None
    assert verdict.ok is False
    assert verdict.gradients_equal is (what_for != "scaling")
    assert verdict.buffers_equal is False
    assert verdict.rng_equal is True
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.verdict) == (str(caught.value), verdict)


@pytest.mark.usefixtures("declared")
def test_a_block_whose_second_call_is_another_is_kept_by_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []

    def modules_that_may(solver: Solver, budget_bytes: int, *_: Any) -> Plan:
        may = [can_recompute_module(solver.index, region) for region in range(len(solver.profile.regions))]
        chosen.append(sum(may))
        return build_plan(solver.index, [Decision("module") if one else None for one in may], budget_bytes)

    monkeypatch.setattr(search, "_choose", modules_that_may)
    verdict = tightfit.fit(Net("branching"), BATCH).verdict
    assert verdict is not None
    assert verdict.ok is True
    assert chosen[0] > 0
    assert chosen[-1] == 0


@pytest.mark.usefixtures("declared")
def test_state_outside_the_model_leaves_the_proof_open() -> None:
    """A few gradients are the same whatever the count is: they prove nothing of the blocks."""
    with pytest.warns(ProofWarning, match=r"two plain steps from one state differ in .*blocks\.0#0"):
        verdict = tightfit.fit(Net("global"), BATCH).verdict
    assert verdict is not None
    assert verdict.ok is None
    assert 0 < verdict.compared_share < 0.5


@pytest.mark.usefixtures("declared")
def test_where_plain_does_not_fit_its_regions_show_it() -> None:
    plan = recompute_every_module(Solver(tightfit.measure(Net("scaling"), BATCH)), 2**40)
    with pytest.raises(VerificationFailed, match=r"blocks\.\d#0: gradient of ") as caught:
        tightfit.fit(Net("scaling"), BATCH, budget=(plan.predicted_peak_bytes + plan.plain_peak_bytes) // 2)
    assert caught.value.verdict.method == "per-region"


@pytest.mark.usefixtures("declared")
def test_on_failure_warn_goes_on_with_the_plan() -> None:
    model = Net("scaling")
    with pytest.warns(ProofWarning, match=r"gradient of .* differ.* The plan is installed all the same") as told:
        applied = tightfit.fit(model, BATCH, on_failure="warn")
    assert len(told) == 1
    assert applied.installed
    assert applied.verdict is not None
    assert applied.verdict.ok is False
    with pytest.raises(UnsupportedInput, match="on_failure='ask' is not a choice"):
        tightfit.fit(Net(), BATCH, on_failure="ask")  # type: ignore[arg-type]  # the mistake that is told


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("reference_bytes", [None, 2**30], ids=["regions", "whole steps"])
def test_marks_say_what_differs_and_by_how_much_as_copies_do(
    reference_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU only marks are kept; what differs by its mark is copied in another run."""
    plan = recompute_every_module(Solver(tightfit.measure(Net("scaling"), BATCH)), 2**40)
    found = []
    for is_host in (True, False):
        monkeypatch.setattr(marks, "device_for", lambda _, is_host=is_host: SimpleNamespace(is_host=is_host))
        verdict = tightfit.verify(
            Net("scaling"), BATCH, dataclasses.replace(plan, budget_bytes=plan.plain_peak_bytes - 1), steps=2,
            reference_budget_bytes=reference_bytes,
        )  # fmt: skip
        found.append((verdict.method, verdict.differing, verdict.max_abs_difference))
    assert found[0] == found[1]
    assert found[0][1]
    assert found[0][2] > 0


def test_a_peak_over_the_budget_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = search.try_plan

    def over(trial: Trial, applied: tightfit.Applied, profile: Profile) -> tuple[Outcome, Profile]:
        outcome, profile = right(trial, applied, profile)
        assert outcome is not None
        object.__setattr__(outcome, "peak_bytes", applied.plan.budget_bytes + 1)
        return outcome, profile

    monkeypatch.setattr(search, "try_plan", over)
    model = Net()
    with pytest.raises(VerificationFailed, match=r"the measured peak of .* is over the budget of 1\.0 MiB"):
        tightfit.fit(model, BATCH, budget="1MiB")
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.usefixtures("declared")
def test_a_run_stops_before_its_first_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(run_of("counting_model")) == 1
    told = capsys.readouterr()
    assert "the planned step is not the plain step within its budget: gradient of" in told.err
    assert "Traceback" not in told.err + told.out
    assert not list(tmp_path.glob("runs/**/*"))
    assert main([*run_of("counting_model"), "--dry-run"]) == 1


# ------------------------------------------------------------------------------------------------ what is not proven


class Layers(nn.Module):
    """Between its layers and in its loss there is something to drop, too."""

    between: Any = staticmethod(torch.sigmoid)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 96), nn.Tanh(), nn.Dropout(0.1), nn.Linear(96, 32))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(x + layer(x))
        return x


def steady(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).log_softmax(-1).pow(2).mean()


def layers_model() -> tuple[nn.Module, Any]:
    return Layers(), steady


@pytest.fixture(scope="module")
def budget() -> int:
    """One byte less than the plain step needs."""
    return tightfit.solve(tightfit.measure(Layers(), BATCH, loss=steady), 2**40).plain_peak_bytes - 1


def test_what_is_not_proven_is_told_once(budget: int) -> None:
    settings: dict[str, Any] = {"loss": steady, "budget": budget, "grad_checkpoint": "full"}
    with pytest.warns(ProofWarning, match=r"<model>#0/1, .* cannot be compared alone.*100% of the gr") as told:
        applied = tightfit.fit(Layers(), BATCH, **settings)
    assert len(told) == 1
    assert told[0].filename == __file__
    verdict = applied.verdict
    assert verdict is not None
    assert (verdict.ok, verdict.method, verdict.gradients_equal, verdict.loss_equal) == (None, "per-region", True, None)
    assert verdict.compared_share == 1.0
    # What is between the layers; the loss is compared.
    assert {name.partition("/")[0] for name in verdict.unverified} == {"<model>#0"}
    applied.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tightfit.fit(Layers(), BATCH, **settings, reference_budget_bytes=2**40) as applied:
            assert applied.verdict is not None
            assert (applied.verdict.ok, applied.verdict.reason, applied.verdict.compared_share) == (True, "", 1.0)


def test_a_run_says_what_is_not_proven(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*run_of("layers_model"), "--grad-checkpoint", "full"]
    assert main([*words, "--dry-run", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["ok"], plain["compared_share"]) == (True, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*words, "--memory", str(plain["plain_peak_bytes"] - 1), "--quiet"]) == 0
    assert "proof   not complete: <model>#0/1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ not reproducible


@pytest.fixture
def counter() -> Iterator[Any]:
    """A source of numbers that nobody puts back."""
    return itertools.count(1)


def test_a_loss_that_is_never_the_same_leaves_its_regions_to_compare(counter: Any) -> None:
    def unsteady(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).pow(2).mean() * (1 + next(counter) / 100)

    with tightfit.fit(Layers(), BATCH, loss=unsteady, grad_checkpoint="full") as applied:
        verdict = applied.verdict
    assert verdict is not None
    assert (verdict.method, verdict.gradients_equal, verdict.loss_equal) == ("per-region", True, None)
    assert verdict.compared_share == 1.0
    assert verdict.plain_reproducible is False
    assert verdict.differing == ()


class Unsteady(nn.Module):
    """Adds what is never the same; unless deterministic kernels are asked for, if there are any."""

    def __init__(self, numbers: Any, has_deterministic_kernel: bool) -> None:
        super().__init__()
        self.numbers, self.has_deterministic_kernel = numbers, has_deterministic_kernel
        self.inner = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        number = next(self.numbers)
        if self.has_deterministic_kernel and torch.are_deterministic_algorithms_enabled():
            number = 0
        return self.inner(torch.tanh(x * (1 + number / 100)))


@pytest.mark.parametrize("has_deterministic_kernel", [False, True])
def test_a_module_that_is_never_the_same(counter: Any, has_deterministic_kernel: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Unsteady(counter, has_deterministic_kernel) for _ in range(3)))
    settings: dict[str, Any] = {"loss": lambda model, batch: model(batch).pow(2).mean(), "grad_checkpoint": "full"}
    if has_deterministic_kernel:
        with tightfit.fit(model, BATCH, **settings) as applied:
            assert applied.verdict is not None
            assert applied.verdict.gradients_equal is True
            assert applied.verdict.compared_share == 1.0
    else:
        with pytest.warns(ProofWarning, match=r"two plain steps from one state differ in .*; 0% of the gradients"):
            verdict = tightfit.fit(model, BATCH, **settings).verdict
        assert verdict is not None
        assert (verdict.ok, verdict.gradients_equal, verdict.compared_share) == (None, None, 0.0)
    assert not torch.are_deterministic_algorithms_enabled()


_numbers = itertools.count()


class Diary(nn.Module):
    """Leaves in attributes what is another in each run, or tells of the step itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.by_number: dict[int, Any] = {}
        self.by_address: dict[Any, Any] = {}
        self.packed = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)

    def forward(self, x: Tensor) -> Tensor:
        self.by_number[next(_numbers)] = x.shape[0]
        self.by_address[id(x)] = self.by_address[id(x), "text"] = repr(object())
        self.caller = sys._getframe(1).f_code.co_filename
        self.depth = len(traceback.extract_stack())
        return x + self.layers(x)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_what_attributes_tell_of_the_step_itself_is_not_the_plans_doing() -> None:
    model = nn.Sequential(Diary(), Diary())
    with tightfit.fit(model, BATCH, loss=lambda model, batch: model(batch).sum(), grad_checkpoint="full") as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok, applied.verdict
