"""What a user's own module may hold: factories of models and datasets, good ones and bad ones."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def numbers(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """A regression problem: the sum of four numbers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=generator)
    return [(row, row.sum().unsqueeze(0)) for row in inputs]


def ragged_data() -> list[Tensor]:
    return [torch.zeros(2), torch.zeros(3)]


def no_data() -> list[Tensor]:
    return []


def endless_data() -> Any:
    return iter(int, 1)


class OwnLoss(nn.Module):
    """Returns its loss, as many models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(inputs), targets)}


def own_loss_model(width: int = 8) -> nn.Module:
    return OwnLoss(width)


def model_and_loss(width: int = 8) -> tuple[nn.Module, Any]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs) - targets).abs().mean()

    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)), loss


def vector_loss_model() -> tuple[nn.Module, Any]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs) - targets) ** 2

    return nn.Linear(4, 1), loss


def lossless_model() -> nn.Module:
    class Lossless(nn.Linear):
        def forward(self, inputs: Tensor, targets: Tensor) -> str:  # type: ignore[override]  # nn.Linear's takes one
            return "no loss"

    return Lossless(4, 1)


def frozen_model() -> nn.Module:
    return OwnLoss(8).requires_grad_(False)


def not_a_model() -> str:
    return "not a model"


NOT_CALLABLE = 3


def divided_numbers() -> tuple[list[Any], list[Any]]:
    """Samples for training, and for evaluation."""
    return numbers(64), numbers(24)


class Noisy:
    """Samples that draw random numbers from all three generators, as augmentation does."""

    def __init__(self) -> None:
        self._samples = numbers()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self._samples[index]
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return inputs + 0.1 * noise, targets


def noisy_numbers() -> Noisy:
    return Noisy()


class Ragged(list[Tensor]):
    """Rows of different lengths, padded with zeros."""

    @staticmethod
    def collate(samples: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)


def ragged_numbers(count: int = 40) -> Ragged:
    """Number 37 is much longer than the others."""
    lengths = [400 if number == 37 else 3 + number % 5 for number in range(count)]
    return Ragged(torch.arange(1.0, length + 1) / length for length in lengths)


def token_mean_model() -> tuple[nn.Module, Any]:
    """A loss that is a mean over what is not padding."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        errors = (model(batch.unsqueeze(-1)).squeeze(-1) - batch) ** 2
        return (errors * (batch != 0)).sum() / (batch != 0).sum()

    loss.weight = lambda batch: float((batch != 0).sum())  # type: ignore[attr-defined]  # set by hand
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), loss


def numbers_with_nan() -> list[tuple[Tensor, Tensor]]:
    """One reading is missing."""
    samples = numbers()
    samples[5][0][2] = float("nan")
    return samples


class Odd(nn.Module):
    """A block that is called twice, one that is never called, and one that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
        self.never = nn.Linear(4, 4)
        self.frozen = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).requires_grad_(False)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        hidden = self.twice(self.frozen(self.twice(inputs)))
        return {"loss": nn.functional.mse_loss(self.head(hidden), targets)}


def odd_model() -> nn.Module:
    return Odd()


class LeavesOut(OwnLoss):
    """Has a second branch that only some steps use."""

    def __init__(self, uses: Callable[[Tensor], bool]) -> None:
        super().__init__(8)
        self.side = nn.Linear(4, 1)
        self._uses = uses

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found = super().forward(inputs, targets)
        return {"loss": found["loss"] + self.side(inputs).mean() ** 2} if self._uses(inputs) else found


def leaves_out_by_data() -> nn.Module:
    return LeavesOut(lambda inputs: bool(inputs.sum() > 0))


def leaves_out_at_random() -> nn.Module:
    return LeavesOut(lambda _: random.random() < 0.5)


def leaves_out_later() -> nn.Module:
    """Which nothing announces."""
    calls = itertools.count()
    return LeavesOut(lambda _: next(calls) < 40)


class ChangesLater(OwnLoss):
    """Computes something else after some calls, without a sign of it."""

    def __init__(self) -> None:
        super().__init__(8)
        self._calls = itertools.count()

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return super().forward(inputs.sin() if next(self._calls) < 40 else inputs.cos().exp(), targets)


def changes_later() -> nn.Module:
    return ChangesLater()


class RunsOut(OwnLoss):
    """In the process of rank 1 it has no more memory as soon as there is a file ``run-out``."""

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if os.environ.get("RANK") == "1" and os.path.exists("run-out"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        hidden = self.layers[0](inputs).repeat(1, 64)
        for _ in range(6):  # which a plan may drop
            hidden = hidden.sin()
        return super().forward(inputs + hidden.mean(), targets)


def runs_out() -> nn.Module:
    return RunsOut(8)


class _Exhausting(torch.autograd.Function):
    """A backward for which one rank has no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if type(gradients[0]) is Tensor and os.environ.get("RANK") == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about that.")
        return gradients[0]


class Exhausts(nn.Module):
    """Blocks to be sharded; the process of rank 1 runs out of memory in the midst of backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4)) for _ in range(4)),
        )

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        for number, block in enumerate(self.blocks):
            inputs = block(_Exhausting.apply(inputs) if number == 2 else inputs)
        return {"loss": nn.functional.mse_loss(inputs.sum(1, keepdim=True), targets)}


def exhausts() -> nn.Module:
    return Exhausts()


class NoisyRagged(Ragged):
    """Samples that draw random numbers and differ in length."""

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        return row + 0.1 * torch.rand(row.shape) + random.random() + float(np.random.rand())


def noisy_ragged_numbers(count: int = 24) -> NoisyRagged:
    return NoisyRagged(torch.arange(1.0, 4 + number % 5) for number in range(count))


class Hanging(list[tuple[Tensor, Tensor]]):
    """Numbers of which one never comes from a worker."""

    def __getitem__(self, number: Any) -> Any:
        if number == 20 and torch.utils.data.get_worker_info() is not None:
            time.sleep(1000)
        return super().__getitem__(number)


def hanging_numbers() -> Hanging:
    return Hanging(numbers())


class DrawsEverywhere(nn.Module):
    """Dropout, a random operation, and decisions that Python's and NumPy's generators take."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.dropout, self.down = nn.Linear(1, 16), nn.Dropout(0.3), nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dropout(self.up(inputs).tanh())
        if self.training and random.random() < 0.5:
            hidden = hidden + torch.randn_like(hidden) * float(np.random.rand())
        output: Tensor = self.down(hidden)
        return output


def draws_everywhere() -> tuple[nn.Module, Any]:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return ((model(batch.unsqueeze(-1)).squeeze(-1) - batch) ** 2).mean()

    return DrawsEverywhere(), loss


class Masked(OwnLoss):
    """Holds infinity on purpose."""

    def __init__(self) -> None:
        super().__init__(8)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))


def masked_model() -> nn.Module:
    return Masked()


class FailsLater(OwnLoss):
    """Has dropout and BatchNorm, and raises what a file says, in the midst of forward, while that is there."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        inputs = nn.functional.dropout(self.norm(inputs), 0.25)
        if self.training and torch.is_grad_enabled() and os.path.exists("fail"):
            raise _failure()
        return super().forward(inputs, targets)


def _failure() -> Exception:
    """What the file says; of a lack of memory so often as it says."""
    with open("fail") as file:
        kind, _, times = file.read().partition(" ")
    if kind != "memory":
        return ZeroDivisionError("in the user's forward")
    os.remove("fail")
    if int(times) > 1:
        with open("fail", "w") as file:
            file.write(f"memory {int(times) - 1}")
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fails_later() -> nn.Module:
    return FailsLater(8)
