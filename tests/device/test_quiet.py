"""`fit` writes nothing to the user's terminal, and hides nothing that others write there."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import tightfit


def fit(loss: Any) -> tightfit.Applied:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return tightfit.fit(model, torch.randn(4, 8), budget="1GiB", loss=loss, optimizer=optimizer)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def what_a_profiler_prints(capfd: pytest.CaptureFixture[str]) -> list[str]:
    capfd.readouterr()
    with profile(activities=[ProfilerActivity.CPU]):
        torch.ones(3).add(1)
    return re.findall(r"[a-z_A-Z]*$", capfd.readouterr().err, re.MULTILINE)


def test_the_profiler_is_silent_in_fit_only(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    what_a_profiler_prints(capfd)  # the first one initialises it, which prints more
    before = what_a_profiler_prints(capfd)
    fit(mean_square).remove()
    assert capfd.readouterr().err == ""
    assert what_a_profiler_prints(capfd) == before


def test_whoever_chose_what_the_profiler_prints_is_left_alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    what_a_profiler_prints(capfd)
    prints_something = any(what_a_profiler_prints(capfd))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "0")
    fit(mean_square).remove()
    assert bool(capfd.readouterr().err) == prints_something


def test_what_the_step_prints_and_warns_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def loud(model: nn.Module, batch: Tensor) -> Tensor:
        print("from the step", file=sys.__stderr__)
        warnings.warn("of the step", stacklevel=1)
        return mean_square(model, batch)

    model, batch = nn.Linear(4, 4), torch.randn(2, 4)
    plan = tightfit.solve(tightfit.measure(model, batch, loss=mean_square), budget_bytes=2**30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tightfit.verify(model, batch, plan, loss=loud).ok
    steps = capfd.readouterr().err.count("from the step")
    assert steps == len([warning for warning in caught if "of the step" in str(warning.message)]) > 0


# Dynamo's own, when it looks at an argument: an error only where warnings are.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_loss_is_silent_and_nothing_of_ours_is_compiled(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    unraisable: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    square = torch.compile(lambda x: x.square().mean(), backend=backend)
    applied = fit(lambda model, batch: square(model(batch)))
    applied.remove()
    assert applied.verdict is not None
    assert applied.verdict.ok
    assert not unraisable
    assert capfd.readouterr().err == ""
    assert len(compiled) == 1  # the loss, which runs as in the plain step
