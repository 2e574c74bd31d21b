"""Recurrent layers by cuDNN, whose dropout has a random state of its own: made once, at the first call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tightfit
from tightfit.device.memory import resident_bytes
from tightfit.solver.solver import full_plan, plain_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

LossOf = Callable[[nn.Module, Tensor], Tensor]


class Recurrent(nn.Module):
    """A dropout that a plan drops, before a recurrent layer with a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 32))
        self.lstm = nn.LSTM(32, 32, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.before(x))[0])


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def squares_in_bf16(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return squares(model, batch)


def losses_and_states(model: nn.Module, batch: Tensor, loss_of: LossOf = squares) -> list[tuple[float, list[int]]]:
    """The loss of each step, and where the GPU's generator is after it."""
    torch.manual_seed(0)
    found = []
    for _ in range(3):
        loss = loss_of(model, batch)
        loss.backward()
        found.append((loss.item(), torch.cuda.get_rng_state().tolist()))
    return found


def test_replayed_dropouts_leave_the_random_state_of_recurrent_layers_alone() -> None:
    model, batch = Recurrent().to("cuda"), torch.randn(8, 16, 32, device="cuda")
    plain = losses_and_states(model, batch)
    assert plain[1][1] != plain[0][1]
    profile = tightfit.measure(model, batch, loss=squares)
    with tightfit.apply(model, full_plan(profile, 2**50)) as applied:
        assert losses_and_states(model, batch) == plain
        assert applied.statistics.replayed_ops > 0


@pytest.mark.parametrize("loss", [squares, squares_in_bf16])
def test_the_step_that_makes_that_state_and_the_later_ones_are_the_planned_one(loss: LossOf) -> None:
    """In bf16 the weights are laid out anew between the making of that state and the layer."""
    model, batch = Recurrent().to("cuda"), torch.randn(8, 16, 32, device="cuda")
    profile = tightfit.measure(model, batch, loss=loss)
    assert "aten._cudnn_rnn.default" in {signature.name for signature in profile.signatures}
    with tightfit.apply(model, full_plan(profile, 2**50)) as applied:
        losses_and_states(model, batch, loss)
        assert applied.statistics.dropped_slots > 0
        assert applied.statistics.mismatches == 0


def test_what_recurrent_layers_take_for_themselves_is_in_the_prediction() -> None:
    model = nn.LSTM(128, 256, num_layers=2, dropout=0.1, batch_first=True).to("cuda")
    batch = torch.randn(64, 128, 128, device="cuda")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[0].square().mean()

    profile = tightfit.measure(model, batch, loss=loss)
    assert profile.allocator is not None
    predicted = plain_plan(profile, 2**50).predicted_allocated_bytes - profile.allocator.beside_bytes
    loss(model, batch).backward()
    base = torch.cuda.memory_allocated() - resident_bytes(model, batch)
    torch.cuda.reset_peak_memory_stats()
    loss(model, batch).backward()
    measured = torch.cuda.max_memory_allocated() - base
    assert abs(predicted - measured) <= 0.03 * measured
