"""A plan survives other dtypes, branches and modes, and adapters that are added later."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.planning.shape_case import LONG, MIDDLE, SHORT, Case
from tests.replay.helpers import differences
from tests.support.shape_models import WIDTH, WORDS, Tensor, Transformer, batch_of, gradients, next_word_loss
from tightfit.installation.region_forward import RegionForward


def test_eval_mode_with_gradients_and_back(case: Case) -> None:
    case.model.eval()
    case.assert_gradients_are_plain(batch_of(MIDDLE))
    assert case.counts.tried == 1
    assert case.peak(batch_of(MIDDLE)) <= case.budget_bytes
    case.model.train()
    case.assert_gradients_are_plain(batch_of(MIDDLE))
    case.model.eval()
    case.assert_gradients_are_plain(batch_of(SHORT))
    assert (case.counts.tried, case.counts.mismatched_steps) == (1, 0)


@pytest.mark.slow
def test_another_dtype(budget_bytes: int) -> None:
    case = Case(Transformer(), 2 * budget_bytes, length=2 * LONG)
    case.model.double()
    for parameter in case.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    case.optimizer.state.clear()
    case.optimizer.step()
    assert case.peak(batch_of(LONG)) <= 2 * budget_bytes
    case.assert_gradients_are_plain(batch_of(LONG))
    assert (case.counts.tried, case.counts.mismatched_steps) == (1, 0)
    case.applied.remove()


def test_autocast_around_the_step(case: Case) -> None:
    batch = batch_of(MIDDLE)

    def under_autocast(loss: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    with case.applied.paused():
        plain = gradients(case.model, lambda: under_autocast(lambda: next_word_loss(case.model, batch)))
    planned = gradients(case.model, lambda: under_autocast(lambda: case.loss(batch)))
    assert differences(plain, planned) == []
    assert (case.counts.tried, case.counts.mismatched_steps) == (1, 0)
    longer = batch_of(LONG)
    under_autocast(lambda: case.loss(longer)).backward()
    assert case.counts.tried + case.counts.solved + case.counts.reused + case.counts.plain == 2
    tried = case.counts.tried
    case.assert_gradients_are_plain(batch)
    assert (case.counts.tried, case.counts.mismatched_steps) == (tried, 0)


class LowRank(nn.Module):
    """A trainable low-rank term beside a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_that_is_added_later(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    case.loss(batch_of(SHORT)).backward()
    for block in case.model.blocks:
        block.up = LowRank(block.up)
    with caplog.at_level(logging.WARNING, logger="tightfit"):
        case.assert_gradients_are_plain(batch_of(MIDDLE))
    assert "in none of the optimizers" in caplog.text
    assert case.counts.tried == 1
    caplog.clear()
    case.optimizer.add_param_group({"params": [p for n, p in case.model.named_parameters() if ".up.up" in n]})
    case.optimizer.add_param_group({"params": [p for n, p in case.model.named_parameters() if ".up.down" in n]})
    with caplog.at_level(logging.WARNING, logger="tightfit"):
        case.assert_gradients_are_plain(batch_of(MIDDLE))
    assert "in none of the optimizers" not in caplog.text
    for parameter in case.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    case.optimizer.step()
    assert case.peak(batch_of(MIDDLE)) <= case.budget_bytes
    assert (case.counts.tried, case.counts.mismatched_steps) == (2, 0)


def test_blocks_that_are_replaced_or_frozen_later(case: Case) -> None:
    torch.manual_seed(3)
    case.model.blocks[0] = type(case.model.blocks[1])()
    case.assert_gradients_are_plain(batch_of(MIDDLE))
    assert isinstance(vars(case.model.blocks[0]).get("forward"), RegionForward)
    case.model.words.requires_grad_(False)
    case.model.blocks[1].requires_grad_(False)
    case.assert_gradients_are_plain(batch_of(MIDDLE))
    case.model.requires_grad_(True)
    case.assert_gradients_are_plain(batch_of(MIDDLE))
    assert case.counts.mismatched_steps == 0


class Branching(Transformer):
    """Goes through its blocks once more where an attribute, or the data, says so."""

    again = False
    by_data = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
            if self.again or (self.by_data and bool(tokens[0, 0] == 1)):
                x = torch.sin(block(x))
        return self.head(x)


def test_a_branch_that_is_taken_for_good_is_learnt(budget_bytes: int) -> None:
    case = Case(Branching(), budget_bytes, length=SHORT)
    case.model.again = True
    case.assert_gradients_are_plain(batch_of(SHORT))
    assert (case.counts.mismatched_steps, case.counts.replanned) == (1, 0)
    for _ in range(3):
        case.assert_gradients_are_plain(batch_of(SHORT))
    assert (case.counts.mismatched_steps, case.counts.replanned) == (1, 1)
    assert case.peak(batch_of(SHORT)) <= case.budget_bytes
    case.applied.remove()


def test_a_branch_that_the_data_decides(budget_bytes: int) -> None:
    model = Branching()
    model.by_data = True
    case = Case(model, budget_bytes, length=SHORT)
    assert case.applied.profile is not None
    assert case.applied.profile.data_dependent
    straight, longer = batch_of(SHORT).clone(), batch_of(SHORT).clone()
    straight[0, 0], longer[0, 0] = 2, 1
    for batch in (straight, longer, straight, longer):
        with case.applied.paused():
            plain = gradients(model, lambda batch=batch: next_word_loss(model, batch))
        assert differences(plain, gradients(model, lambda batch=batch: case.loss(batch))) == []
    assert case.counts.mismatched_steps == 2
    assert (case.counts.replanned, case.counts.tried) == (0, 0)
    case.applied.remove()


#: How many autocast contexts were open around the model's own; no attribute, as planning puts those back.
depths: set[int] = set()


class HalfHead(nn.Linear):
    """Computes in bfloat16, in a context of its own."""

    def forward(self, x: Tensor) -> Tensor:
        depths.add(torch.autocast_increment_nesting() - 1)
        torch.autocast_decrement_nesting()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


@pytest.mark.slow
def test_autocast_inside_the_model(budget_bytes: int) -> None:
    """Inside another context, it would not forget the weights that it casts: a later step would cast none."""
    model = Transformer()
    model.head = HalfHead(WIDTH, WORDS)
    depths.clear()
    case = Case(model, budget_bytes)
    model.eval()
    for length in (MIDDLE, LONG):
        case.assert_gradients_are_plain(batch_of(length))
    assert (case.counts.tried, case.counts.mismatched_steps) == (2, 0)
    assert depths == {0}
    case.applied.remove()
