"""A `Step` and the single keywords are two ways to say the same thing, to every verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import Step, UnsupportedInput

BATCH = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().square().mean()


def keywords_of(model: nn.Module) -> dict[str, Any]:
    return {
        "loss": loss_of,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "accumulation_steps": 2,
        "autocast": torch.bfloat16,
        "clip_norm": 1.0,
    }


def measured(model: nn.Module, **how: Any) -> tightfit.Profile:
    profile = tightfit.measure(model, BATCH, **how)
    # What is freed at one moment, when autocast forgets cast weights, is freed in any order.
    return replace(profile, measuring_ms={}, events=tuple(sorted(profile.events)))


def fitted(model: nn.Module, **how: Any) -> tuple[tightfit.Plan, tightfit.Verdict]:
    with tightfit.fit(model, BATCH, grad_checkpoint="full", **how) as applied:
        assert applied.verdict is not None
        return applied.plan, untimed(applied.verdict)


def verified(model: nn.Module, **how: Any) -> tightfit.Verdict:
    plan = tightfit.solve(tightfit.measure(model, BATCH, **how), 2**30)
    return untimed(tightfit.verify(model, BATCH, plan, **how))


def untimed(verdict: tightfit.Verdict) -> tightfit.Verdict:
    return replace(verdict, step_ms=0.0, plain_step_ms=0.0, overhead_ratio=0.0)


VERBS: dict[str, Callable[..., Any]] = {"measure": measured, "fit": fitted, "verify": verified}


@pytest.mark.parametrize("verb", VERBS)
def test_a_step_is_its_keywords(verb: str) -> None:
    found = []
    for whole in (True, False):
        model = model_of()
        keywords = keywords_of(model)
        found.append(VERBS[verb](model, **({"step": Step(**keywords)} if whole else keywords)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["loss", "optimizer", "accumulation_steps", "autocast", "clip_norm"])
@pytest.mark.parametrize("verb", ["measure", "fit", "verify"])
def test_both_are_refused(verb: str, name: str) -> None:
    model = model_of()
    keyword = {name: keywords_of(model)[name]}
    plans = (tightfit.solve(tightfit.measure(model, BATCH, loss=loss_of), 2**30),) if verb == "verify" else ()
    with pytest.raises(UnsupportedInput, match="step= and single keywords"):
        getattr(tightfit, verb)(model, BATCH, *plans, step=Step(loss=loss_of), **keyword)
    assert not any("forward" in vars(module) for module in model.modules())


def test_apply_takes_a_step() -> None:
    model = model_of()
    plan = tightfit.solve(tightfit.measure(model, BATCH, loss=loss_of), 2**30)
    with tightfit.apply(model, plan, step=Step(loss=loss_of)) as applied:
        assert torch.equal(applied.loss(model, BATCH), loss_of(model, BATCH))


def test_optimizers_are_a_tuple() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters())
    assert Step().optimizers == ()
    assert Step(optimizer=optimizer).optimizers == Step(optimizer=[optimizer]).optimizers == (optimizer,)
    with pytest.raises(UnsupportedInput, match="LBFGS"):
        Step(optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UnsupportedInput, match="accumulation_steps=0"):
        Step(accumulation_steps=0)
