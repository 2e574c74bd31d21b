"""Look at each optimizer step in the process: does it train a planned model, and what does it hold that no plan counts?

PyTorch calls a global hook after every optimizer step.  An optimizer's memory is looked at when it is new or has other
groups; later steps cost a look into a table.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tightfit._torch_private.tensors import storage_bytes, storage_key, version_of
from tightfit.device import device_for
from tightfit.distributed.fsdp import is_sharded
from tightfit.installation.promises import Promises
from tightfit.records import Plan
from tightfit.step.own_steps import is_own_step

_watches: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()
_hook: Any = None


class OptimizerWatch:
    """Watches the optimizers of one planned model."""

    def __init__(self, model: torch.nn.Module, promises: Promises) -> None:
        self._model = model
        self._promises = promises
        self._beside_bytes = 0
        self._reached: Callable[[], Iterable[torch.Tensor]] = tuple
        self.plan: Plan | None = None
        """The last plan that was active, which counts what is resident."""
        self.is_idle = False
        """What runs now is not the user's training, or plain on purpose."""
        self.expects_forward = False
        """The model's steps go through a forward that drops something."""
        self._sizes: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, ...]] = weakref.WeakKeyDictionary()
        self._own: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._gradients: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._others: weakref.WeakKeyDictionary[torch.optim.Optimizer, None] = weakref.WeakKeyDictionary()
        """Optimizers of other parameters that stepped between two steps of the model's own."""
        self._stepped: set[int] | None = None
        """Optimizers that stepped since the last planned forward; None: none ran yet."""

    def begin(
        self,
        optimizers: tuple[torch.optim.Optimizer, ...],
        beside_step_bytes: int = 0,
        reached: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> None:
        """Watch from now on.

        Args:
            optimizers: those that the plan counts.
            beside_step_bytes: reserved beside the step.
            reached: returns tensors outside the model that the plan counts.
        """
        global _hook
        self._beside_bytes = beside_step_bytes
        self._reached = reached
        self._own.update(optimizers)
        if any(parameter.grad is not None for parameter in self._model.parameters()):
            self._stepped = set()  # a backward before the plan: its step is not the plan's
        _watches.add(self)
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_optimizer_stepped)

    def end(self) -> None:
        """Watch no longer."""
        global _hook
        _watches.discard(self)
        if not _watches and _hook is not None:
            _hook.remove()
            _hook = None

    def planned_forward(self) -> None:
        """Note that a forward of the model runs as planned, or plain because the user asked for that."""
        if self._stepped is None or self._stepped:
            self._stepped = set()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at an optimizer that has just stepped."""
        if self.is_idle:
            return
        sizes = tuple([len(group["params"]) for group in optimizer.param_groups])
        if self._sizes.get(optimizer) != sizes:
            self._sizes[optimizer] = sizes
            self._look_at_memory(optimizer)
        if optimizer not in self._own:
            if self._gradients:  # one of the model's own has stepped before
                self._others[optimizer] = None
            return
        if self._others:
            self._look_at_others()
        first = next(_gradients(optimizer), None)
        if first is None:
            return
        seen, self._gradients[optimizer] = self._gradients.get(optimizer), (id(first), version_of(first))
        if self._stepped is not None and id(optimizer) not in self._stepped:
            self._stepped.add(id(optimizer))
        elif not self.expects_forward or seen == self._gradients[optimizer]:
            return
        elif any(bool(gradient.any()) for gradient in _gradients(optimizer)):
            # Zeros are no training: they make optimizer state.
            self._promises.forward_gone_round()

    def _look_at_memory(self, optimizer: torch.optim.Optimizer) -> None:
        planned = {id(parameter) for parameter in self._model.parameters()}
        if not any(id(parameter) in planned for parameter in _parameters(optimizer)):
            return
        self._own.add(optimizer)
        state = [tensor for one in self._own for tensor in _state(one)]
        counted_bytes = self.plan.breakdown.get("optimizer_state", 0) if self.plan is not None else 0
        more_bytes = self._bytes(state) - counted_bytes
        if self._is_too_much(more_bytes):
            self._promises.uncounted_optimizer(type(optimizer).__name__, more_bytes)

    def _look_at_others(self) -> None:
        others = list(self._others)
        self._others.clear()
        parameters = [parameter for one in others for parameter in _parameters(one)]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        counted = {id(tensor) for tensor in self._reached()}
        found = [*parameters, *gradients, *(tensor for one in others for tensor in _state(one))]
        more_bytes = self._bytes([tensor for tensor in found if id(tensor) not in counted])
        if self._is_too_much(more_bytes):
            self._promises.uncounted_model(type(others[0]).__name__, more_bytes)

    def _is_too_much(self, more_bytes: int) -> bool:
        plan = self.plan
        if plan is None or is_sharded(self._model):
            return False
        return more_bytes > max(0, plan.budget_bytes + self._beside_bytes - plan.predicted_peak_bytes)

    def _bytes(self, tensors: list[torch.Tensor]) -> int:
        device = device_for(self._model)
        there = [tensor for tensor in tensors if device.holds(tensor) and tensor.layout is torch.strided]
        return sum({storage_key(tensor): storage_bytes(tensor) for tensor in there}.values())


def _optimizer_stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if is_own_step():
        return
    for watch in tuple(_watches):
        watch.stepped(optimizer)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _gradients(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None)


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        tensor
        for entries in optimizer.state.values()
        for tensor in (entries.values() if isinstance(entries, dict) else ())
        if isinstance(tensor, torch.Tensor)
    ]
