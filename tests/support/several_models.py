"""Two networks that train each other, and what of a training is compared and metered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.planning_meter import PlanningMeter

WIDTH, ROWS = 16, 128


class Stack(nn.Module):
    """Blocks between two linear layers, with a BatchNorm, whose statistics a second forward would move."""

    def __init__(self, inputs: int, outputs: int, depth: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(depth)
        )
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]  # calls of modules are not annotated


def stack(inputs: int = 8, outputs: int = 8, seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack(inputs, outputs)


def batches(count: int = 5, rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, rows, 8, generator=generator)
    return [(draw(), draw()) for _ in range(count)]


def critic_loss(models: Any, batch: Any) -> Tensor:
    real, noise = batch
    with torch.no_grad():
        made = models["generator"](noise)
    return F.softplus(-models["critic"](real)).mean() + F.softplus(models["critic"](made)).mean()


def generator_loss(models: Any, batch: Any) -> Tensor:
    return F.softplus(-models["critic"](models["generator"](batch[1]))).mean()


def state_of(models: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Tensor]:
    """Parameters, buffers, gradients and optimizer state, by name."""
    found: dict[str, Tensor] = {}
    for number, model in enumerate(models):
        found |= {f"{number} {name}": value.clone() for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{number} gradient of {name}"] = parameter.grad.clone()
    for number, optimizer in enumerate(optimizers):
        for place, entries in enumerate(optimizer.state.values()):
            found |= {f"optimizer {number} {place} {name}": value.clone() for name, value in entries.items()}
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def held_bytes(*things: Any) -> int:
    """Bytes of all distinct storages of modules, with gradients, of optimizers' state, and of tensors."""
    tensors: list[Tensor] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors += [*thing.parameters(), *thing.buffers()]
            tensors += [parameter.grad for parameter in thing.parameters() if parameter.grad is not None]
        elif isinstance(thing, torch.optim.Optimizer):
            tensors += [value for entries in thing.state.values() for value in entries.values()]
        else:
            tensors += thing if isinstance(thing, list | tuple) else [thing]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of(run: Callable[[], object], *held: Any) -> int:
    """The peak of a run in bytes, with what is held when it begins."""
    before = held_bytes(*held)
    with PlanningMeter() as meter:
        run()
    return before + meter.peak
