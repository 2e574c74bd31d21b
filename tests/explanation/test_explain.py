"""`tightfit.explain`: who holds what at the peak of a step, and what would help, each as promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.step.model import give_gradients


class Subject:
    """A model with blocks, its batch, loss and optimizer."""

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Linear(16, 64),
            *[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(3)],
            nn.Linear(64, 4),
        )
        self.batch = torch.randn(256, 16), torch.randint(4, (256,))
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    @staticmethod
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def explain(self, **more: Any) -> tightfit.Explanation:
        return tightfit.explain(self.model, self.batch, loss=self.loss, optimizer=self.optimizer, **more)

    def step_peak(self, around: Callable[[], torch.Tensor]) -> int:
        """The peak of a step by the meter, with gradients and the optimizer's state there."""
        give_gradients(self.model)
        self.optimizer.step()

        def run() -> None:
            around().backward()
            self.optimizer.step()

        return measure_peak(run, resident_bytes(self.model, self.batch, self.optimizer))[1]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject()


@pytest.fixture(scope="module")
def found(subject: Subject) -> tightfit.Explanation:
    return subject.explain()


def test_the_total_is_what_a_meter_finds_and_all_sums_agree(subject: Subject, found: tightfit.Explanation) -> None:
    breakdown = found.breakdown
    assert breakdown.total_bytes == sum(breakdown.components.values()) == sum(breakdown.modules.values())
    fresh = Subject()
    peak = fresh.step_peak(lambda: fresh.loss(fresh.model, fresh.batch))
    assert breakdown.total_bytes == pytest.approx(peak, rel=0.01)
    parameters = {name: p.nbytes for name, p in subject.model.named_parameters()}
    assert breakdown.components["parameters"] == sum(parameters.values())
    assert breakdown.parts["0"]["parameters"] == parameters["0.weight"] + parameters["0.bias"]
    assert 0 < breakdown.held_for_backward_bytes <= breakdown.total_bytes


def test_the_first_way_keeps_its_promise(found: tightfit.Explanation) -> None:
    way = found.ways[0]
    assert way.exactness == "bitwise"
    assert way.saved_ratio > 0.1
    assert way.budget_bytes is not None
    subject = Subject()
    applied = tightfit.fit(
        subject.model, subject.batch, budget=way.budget_bytes, loss=subject.loss, optimizer=subject.optimizer
    )
    with applied:
        peak = subject.step_peak(lambda: applied.loss(subject.model, subject.batch))
    assert peak == pytest.approx(way.peak_bytes, rel=0.02)
    assert peak <= way.budget_bytes


def test_the_microbatches_keep_their_promise(found: tightfit.Explanation) -> None:
    (way,) = (way for way in found.ways if way.name == "microbatches")
    assert "(loss / 2).backward()" in way.code
    subject = Subject()
    subject.batch = subject.batch[0][:128].clone(), subject.batch[1][:128].clone()
    assert subject.step_peak(lambda: subject.loss(subject.model, subject.batch)) == pytest.approx(
        way.peak_bytes, rel=0.02
    )


def test_with_a_budget_what_fits_is_first_and_the_fastest_of_it(subject: Subject, found: tightfit.Explanation) -> None:
    target = round(0.7 * found.breakdown.total_bytes)
    ways = subject.explain(budget=target).ways
    fits = [way.peak_bytes <= target for way in ways]
    assert fits == sorted(fits, reverse=True)
    same_bits = [way.step_ms for way in ways if way.peak_bytes <= target and way.exactness == "bitwise"]
    assert same_bits == sorted(same_bits)
    assert len(same_bits) > 1


def test_what_is_not_worth_it_is_not_told_and_each_plan_once(found: tightfit.Explanation) -> None:
    peaks = [way.peak_bytes for way in found.ways if way.name == "recompute"]
    assert len(peaks) == len(set(peaks))
    assert all(way.saved_ratio >= 0.03 for way in found.ways)
    assert {way.name for way in found.ways} >= {"recompute", "microbatches", "autocast"}


def test_nothing_is_changed(subject: Subject) -> None:
    weights = [parameter.clone() for parameter in subject.model.parameters()]
    state = torch.get_rng_state()
    subject.explain()
    assert torch.equal(torch.get_rng_state(), state)
    assert not subject.optimizer.state
    assert all(torch.equal(p, w) for p, w in zip(subject.model.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_text_and_json_have_the_same_figures(found: tightfit.Explanation) -> None:
    document = json.loads(json.dumps(found.to_json()))
    assert document["step"]["total_bytes"] == found.breakdown.total_bytes
    assert [way["budget_bytes"] for way in document["ways"]] == [way.budget_bytes for way in found.ways]
    text = str(found)
    assert "by module" in text
    assert "autocast off" in text
    assert "tightfit.fit(model, batch, budget=" in text
    assert "held for backward" in text


def test_a_peak_in_the_optimizer_is_helped_by_taking_the_parameters_one_by_one() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    found = tightfit.explain(model, torch.randn(2, 64), loss=lambda m, x: m(x).square().mean(), optimizer=optimizer)
    assert found.breakdown.moment == "optimizer step"
    (way,) = (way for way in found.ways if way.name == "foreach")
    assert way.code == "torch.optim.Adam(..., foreach=False)"
    assert [group["foreach"] for group in optimizer.param_groups] == [True]
    assert way.peak_bytes < found.breakdown.total_bytes


def test_a_model_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(tightfit.UnsupportedInput, match="no parameter that requires a gradient"):
        tightfit.explain(nn.ReLU(), torch.ones(2))


class CheckpointedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return result


def test_a_model_that_checkpoints_itself_is_compared_as_it_is() -> None:
    subject = Subject()
    subject.model = nn.Sequential(nn.Linear(16, 64), *[CheckpointedBlock() for _ in range(3)], nn.Linear(64, 4))
    subject.optimizer = torch.optim.AdamW(subject.model.parameters())
    found = subject.explain()
    assert found.knobs["gradient checkpointing"].startswith("on")
    fresh = subject.step_peak(lambda: subject.loss(subject.model, subject.batch))
    assert found.breakdown.total_bytes == pytest.approx(fresh, rel=0.01)
    assert {way.plain_peak_bytes for way in found.ways} <= {found.breakdown.total_bytes}
