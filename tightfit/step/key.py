"""Identify a step by what a plan depends on: the batch's shapes, the model's state, PyTorch's settings.

Two steps with equal `StepKey`s run the same operations on tensors of the same sizes, as far as that can be told
without running them.  What a model decides by its data, or by its own Python attributes, is not in it; the live tape
notices that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit._torch_private.dispatch import tree_leaves
from tightfit._torch_private.modules import own_children, own_parameters
from tightfit._torch_private.tensors import has_storage, storage_bytes, storage_key
from tightfit.device import Device, device_for
from tightfit.step.microbatch import Microbatch

_DEPTH = 4


@dataclass(frozen=True, slots=True)
class StepKey:
    """What a plan depends on, in a form that can be compared and looked up."""

    sizes: tuple[tuple[int, ...], ...]
    """Of each tensor of the batch, in order."""
    numbers: Hashable
    """Strides and bytes of these tensors, and whole numbers that are in the batch beside them."""
    kind: Hashable
    """What does not change with the size of a batch: its structure, dtypes and flags, the model's modules and
    parameters, the optimizers' parameters, PyTorch's settings."""
    step: str = field(default="", compare=False)
    """Name of the step, where a plan has several kinds of them: a part of `kind`."""

    @property
    def elements(self) -> int:
        """How many elements all tensors of the batch have."""
        return sum(math.prod(size) for size in self.sizes)

    def growth_from(self, other: StepKey) -> float:
        """Return how many times larger than `other`'s a tensor of this batch is, at most; 1 where none is."""
        pairs = zip(self.sizes, other.sizes, strict=True)
        return max([1.0, *(math.prod(a) / max(1, math.prod(b)) for a, b in pairs)])


def step_key(
    watch: ModelWatch,
    batch: Any,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    step: str = "",
    autocast: torch.dtype | None = None,
) -> StepKey:
    """Return the key of a training step on `batch`, as things are now.

    `step`: as for `StepKey`. `autocast`: dtype of the autocast context that forward will run in where none is open
    yet: a context may be opened before the step begins, or inside.
    """
    # A weight is one operation more, whatever its value.
    is_weighted = isinstance(batch, Microbatch) and batch.weight is not None
    arguments = arguments_key(batch.batch if isinstance(batch, Microbatch) else batch)
    state = is_weighted, watch.state(), optimizer_state(optimizers), active_settings(watch.device, autocast)
    return StepKey(arguments.sizes, arguments.numbers, (arguments.kind, state, step), step)


def arguments_key(thing: Any) -> StepKey:
    """Return the key of nested containers and objects alone.

    Compare top-level ints and strings by value (a length, a flag, a mode); inside lists only by type (they belong to
    samples).  Compare floats by type, as they rarely decide what is computed and often change.
    """
    sizes: list[tuple[int, ...]] = []
    numbers: list[Hashable] = []
    kind: list[Hashable] = []
    storages: dict[int, int] = {}
    for name, leaf, alone in _leaves(thing, "", True, _DEPTH):
        if isinstance(leaf, torch.Tensor):
            sizes.append(tuple(leaf.shape))
            kind.append((name, leaf.dtype, leaf.device, leaf.requires_grad, leaf.layout, leaf.dim()))
            if leaf.layout is torch.strided and has_storage(leaf):
                number = storages.setdefault(storage_key(leaf), len(storages))
                numbers.append((leaf.stride(), storage_bytes(leaf), number))
        elif alone and type(leaf) is int:
            numbers.append((name, leaf))
            kind.append(name)
        elif leaf is None or isinstance(leaf, bool) or (alone and isinstance(leaf, str)):
            kind.append((name, leaf))
        else:
            kind.append((name, type(leaf)))
    return StepKey(tuple(sizes), tuple(numbers), tuple(kind))


class ModelState:
    """Which modules there are, which of them train, and the shapes, dtypes and `requires_grad` of the parameters."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Hashable) -> None:
        self._value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ModelState) and self._value == other._value)


class ModelWatch:
    """Describe the state of one model before every step: anew only where it has changed."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._modules: list[tuple[torch.nn.Module, type, bool, dict[str, Any], list[tuple[Any, ...]]]] = []
        self._state: ModelState | None = None
        self._first = next(model.parameters())

    @property
    def device(self) -> Device:
        """Where its first parameter is."""
        return device_for(self._first)

    def state(self) -> ModelState:
        """Return the state as it is now."""
        if self._state is None or not self._is_unchanged():
            self._state = self._described()
        return self._state

    def _is_unchanged(self) -> bool:
        for module, kind, training, children, known in self._modules:
            if module.training is not training or type(module) is not kind or own_children(module) != children:
                return False
            table = own_parameters(module)
            if len(table) != len(known):
                return False
            for now_there, (parameter, shape, dtype, requires_grad) in zip(table.values(), known, strict=True):
                if now_there is not parameter or (
                    parameter is not None
                    and (
                        parameter.requires_grad is not requires_grad
                        or parameter.dtype is not dtype
                        or parameter.shape != shape
                    )
                ):
                    return False
        return True

    def _described(self) -> ModelState:
        """Walk the modules' own tables: `named_modules` and `parameters` take two to four times as long."""
        modules: list[Hashable] = []
        parameters: list[Hashable] = []
        places: dict[torch.nn.Module, int] = {}
        self._modules = []
        self._first = next(self._model.parameters(), self._first)
        to_visit = [self._model]
        while to_visit:
            module = to_visit.pop()
            if module in places:
                modules.append(places[module])  # here again
                continue
            places[module] = len(places)
            children = own_children(module)
            modules.append((type(module), module.training, *children.keys()))
            known = [
                (None, None, None, None) if p is None else (p, p.shape, p.dtype, p.requires_grad)
                for p in own_parameters(module).values()
            ]
            self._modules.append((module, type(module), module.training, dict(children), known))
            parameters += [described[1:] for described in known if described[0] is not None]
            to_visit += [child for child in children.values() if child is not None]
        return ModelState((tuple(modules), tuple(parameters)))


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> Hashable:
    """Return how many parameters each group of each optimizer has."""
    return tuple((type(one), tuple(len(group["params"]) for group in one.param_groups)) for one in optimizers)


def active_settings(device: Device, autocast: torch.dtype | None = None) -> Hashable:
    """Return PyTorch's settings that decide which kernels run; `autocast` as for `step_key`."""
    return (
        device.ambient_autocast() or autocast,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )


def _leaves(thing: Any, name: str, alone: bool, depth: int) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(thing, torch.Tensor) or depth == 0:
        yield name, thing, alone
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from _leaves(value, f"{name}.{key}", alone, depth - 1)
    elif isinstance(thing, list | tuple):
        # The arguments of a call are a tuple; what is in a list belongs to samples. Of tensors, they are the same.
        alone = alone and isinstance(thing, tuple)
        yield f"{name}:sequence", None, alone
        for place, value in enumerate(thing):
            yield from _leaves(value, f"{name}.{place}", alone, depth - 1)
    elif isinstance(getattr(thing, "__dict__", None), dict) and not isinstance(thing, torch.nn.Module | type):
        yield f"{name}:{type(thing).__qualname__}", None, alone
        for key, value in vars(thing).items():
            yield from _leaves(value, f"{name}.{key}", alone, depth - 1)
    else:
        for leaf in tree_leaves(thing):
            yield name, leaf, alone
