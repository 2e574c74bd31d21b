"""What a step holds from its beginning to its end: gradients, and what only its loss reaches, among others.

A model's parameters that require gradients hold them all the time.  A model beside others that no optimizer trains (a
moving average, a teacher), and what only the loss reaches (a discriminator), may never get any: a backward tells.
Where steps take turns, those that are frozen for the turn of others hold theirs meanwhile, and their optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from tightfit._torch_private.tensors import storage_key
from tightfit.device.memory import resident_bytes
from tightfit.step.batch import batch_tensors
from tightfit.step.model import give_gradients
from tightfit.step.models import ModelSet


class Gradients:
    """Know which parameters hold gradients during the whole step, and learn it from backwards."""

    def __init__(self, untrained: Iterable[str] = (), *, take_turns: bool = False) -> None:
        """Begin without any.

        Args:
            untrained: names of the model's parameters that may never get any.
            take_turns: steps of other optimizers or losses come between, for which parameters may be frozen.
        """
        self._untrained = set(untrained)
        self._take_turns = take_turns
        self._trained: set[str] = set()
        """Names of those that required gradients in some turn."""
        self._of_reached: set[int] = set()

    @property
    def count(self) -> int:
        """Grows with each parameter that is learnt of."""
        return len(self._of_reached) - len(self._untrained)

    def give(self, model: torch.nn.Module, reached: Sequence[Any] = ()) -> list[torch.Tensor]:
        """Make zero gradients where there are none yet and there will be; return the parameters that got one."""
        self.learn(model, reached)
        own = {name: each for name, each in model.named_parameters() if name not in self._untrained}
        trained = {name for name, parameter in own.items() if parameter.requires_grad}
        if self._take_turns:
            trained |= self._trained
            self._trained = trained
        without: list[torch.Tensor] = [each for name, each in own.items() if name in trained and each.grad is None]
        without += self.lacking(reached)
        give_gradients(model, *(thing for thing in reached if isinstance(thing, torch.nn.Module)), to=without)
        return without

    def lacking(self, reached: Sequence[Any]) -> list[torch.Tensor]:
        """Return what of it will have a gradient all the time, and has none yet."""
        return [tensor for tensor in _trainable(reached) if id(tensor) in self._of_reached and tensor.grad is None]

    def learn(self, model: torch.nn.Module, reached: Sequence[Any] = ()) -> bool:
        """Look at which parameters have gradients now; return whether there are more than was known."""
        own = {name for name, parameter in model.named_parameters() if parameter.grad is not None} & self._untrained
        known = {id(parameter) for parameter in model.parameters()} | self._of_reached
        others = {id(t) for t in _trainable(reached) if t.grad is not None and id(t) not in known}
        self._untrained -= own
        self._of_reached |= others
        return bool(own or others)


def untrained(model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[str]:
    """Yield the names of parameters without a gradient, of those of several models that no optimizer trains."""
    if not isinstance(model, ModelSet) or not optimizers:
        return
    stepped = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    for path, one in model.named_children():
        if not any(id(parameter) in stepped for parameter in one.parameters()):
            yield from (f"{path}.{name}" for name, parameter in one.named_parameters() if parameter.grad is None)


def tensors_beside(
    model: torch.nn.Module, batch: Any, optimizers: Sequence[torch.optim.Optimizer], reached: Sequence[Any]
) -> list[torch.Tensor]:
    """Return the tensors that only the loss reaches, with their gradients."""
    known = {storage_key(tensor) for tensor in _known(model, batch, optimizers) if tensor.layout is torch.strided}
    found: dict[int, torch.Tensor] = {}
    for thing in reached:
        is_module = isinstance(thing, torch.nn.Module)
        tensors = (*thing.parameters(), *thing.buffers()) if is_module else (thing,)
        for tensor in tensors:
            for part in (tensor, tensor.grad if tensor.is_leaf else None) if isinstance(tensor, torch.Tensor) else ():
                if part is not None and part.layout is torch.strided and storage_key(part) not in known:
                    found[id(part)] = part
    return list(found.values())


def bytes_held(
    model: torch.nn.Module, batch: Any, optimizers: Sequence[torch.optim.Optimizer], reached: Sequence[Any]
) -> int:
    """Return what the allocator took for all that a step finds when it begins."""
    return resident_bytes(model, batch, optimizers, beside=tensors_beside(model, batch, optimizers, reached))


def _known(model: torch.nn.Module, batch: Any, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield from (parameter,) if parameter.grad is None else (parameter, parameter.grad)
    yield from model.buffers()
    yield from batch_tensors(batch)
    for optimizer in optimizers:
        for entries in optimizer.state.values():
            values = entries.values() if isinstance(entries, dict) else ()
            yield from (value for value in values if isinstance(value, torch.Tensor))


def _trainable(reached: Iterable[Any]) -> Iterator[torch.Tensor]:
    for thing in reached:
        tensors = thing.parameters() if isinstance(thing, torch.nn.Module) else (thing,)
        yield from (t for t in tensors if isinstance(t, torch.Tensor) and t.is_leaf and t.requires_grad)
