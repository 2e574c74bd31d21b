"""Prove that a module may be called again in backward: make its call more than once, and compare.

The calls are made as backward would make them.  They must give equal bits, of what they return and of what autograd
saves, leave their arguments alone, and leave nothing behind: afterwards the module, and all that it leads to, is as
before, because what a call disturbs was put back.  What cannot be put back shows here, and the module is not called
again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private.autograd import forbids_saved_tensor_hooks
from tightfit._torch_private.dispatch import tree_leaves
from tightfit._torch_private.tensors import version_of
from tightfit.device import Device
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.device.tensor_parts import has_memory, parts_of
from tightfit.replay.contents import mark_of
from tightfit.replay.executors.module_state import Moves, random_numbers, same_random_numbers
from tightfit.step.outer_variables import outer_variables
from tightfit.step.results import results_of, values_in
from tightfit.step.snapshot import RandomState, TrainingState

#: Makes the call again, given what it moves: with all that it found put in, and put back afterwards. Before that is put
#: back, it shows the result.
CallAgain = Callable[[Moves, Callable[[Any], None]], None]


def prove(module: torch.nn.Module, arguments: Any, device: Device, again: CallAgain) -> Moves | None:
    """Return what a call of the module moves; None if it must not be made again. All is as it was afterwards."""
    outer = [(variable, variable.value) for variable in outer_variables(module)]
    state = TrainingState(module, (), also=(arguments, *(value for _, value in outer)), contents=False)
    moves = _prove(module, arguments, device, again)
    if moves is None:
        for variable, value in outer:
            variable.bind(value)
        state.restore()
    return moves


def _prove(module: torch.nn.Module, arguments: Any, device: Device, again: CallAgain) -> Moves | None:
    try:
        before = _surroundings(module, arguments)
        first = _make(module, again, Moves(tuple(range(len(list(module.buffers())))), random_numbers=True))
        if not _are_equal(before, _surroundings(module, arguments)):
            return None
        for left in reversed(range(device.repetitions)):
            with device.busy_beside() if left % 2 else nullcontext():
                other = _make(module, again, first.moves)
            if other != first or not _are_equal(before, _surroundings(module, arguments)):
                return None
    except _CannotTell:
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and not (isinstance(error, RuntimeError) and forbids_saved_tensor_hooks(error)):
            raise
        return None
    return first.moves


class _CannotTell(Exception):
    """A call reads what it saved itself, or saves what has no mark."""


@dataclass(frozen=True)
class _Made:
    """What a call gave: marks of what it returned, and of what autograd saved, in order."""

    returned: list[object]
    saved: list[object]
    moves: Moves


def _make(module: torch.nn.Module, again: CallAgain, moves: Moves) -> _Made:
    saved: list[object] = []
    found: list[_Made] = []
    buffers = list(module.buffers())
    # By what they hold and by their versions: a buffer that is written with what it held has moved, too.
    before = [(_mark(buffer), version_of(buffer)) for buffer in buffers]
    numbers = random_numbers()

    def pack(tensor: torch.Tensor) -> None:
        saved.append((tuple(tensor.shape), tensor.stride(), tensor.dtype, _mark(tensor)))

    def look(result: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        returned: list[object] = [(tuple(leaf.shape), leaf.stride(), leaf.dtype, _mark(leaf)) for leaf in leaves]
        now = [(_mark(buffer), version_of(buffer)) for buffer in buffers]
        moved = [place for place, found_before in enumerate(before) if now[place] != found_before]
        found.append(_Made(returned, saved, Moves(tuple(moved), not same_random_numbers(random_numbers(), numbers))))

    with torch.autograd.graph.saved_tensors_hooks(pack, _refuse):
        again(moves, look)
    return found[0]


def _refuse(_: object) -> torch.Tensor:
    raise _CannotTell


def _mark(tensor: torch.Tensor) -> object:
    if tensor.layout is not torch.strided:
        raise _CannotTell
    if parts := parts_of(tensor):
        return tuple((name, part.stride(), _mark(part)) for name, part in parts.items())
    if not has_memory(tensor):
        raise _CannotTell
    return mark_of(tensor)


def _surroundings(module: torch.nn.Module, arguments: Any) -> dict[str, object]:
    """Return marks of everything that a call could change."""
    found = results_of(module, lambda _, tensor: _mark(tensor))
    seen: set[int] = set()
    for place, variable in enumerate(outer_variables(module)):
        found |= values_in(f"variable {place} {variable.name}", variable.value, lambda _, tensor: _mark(tensor), seen)
    for name, parameter in module.named_parameters():
        found[f"parameter {name}"] = _mark(parameter)
    for place, leaf in enumerate(tree_leaves(arguments)):
        if isinstance(leaf, torch.Tensor):
            found[f"argument {place}"] = _mark(leaf)
    return found


def _are_equal(before: dict[str, object], after: dict[str, object]) -> bool:
    return before.keys() == after.keys() and all(_same(value, after[name]) for name, value in before.items())


def _same(a: object, b: object) -> bool:
    if isinstance(a, RandomState) and isinstance(b, RandomState):
        return a.equals(b)
    return a == b or repr(a) == repr(b)  # a number that is none, too
