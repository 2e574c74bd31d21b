"""Hold the state in which a module was called, so that a second call finds it, and leaves what is there by then.

What modules have as attributes, buffers that a call moves (running statistics), and the random numbers of Python and
NumPy.  PyTorch's own generators are the executor's matter.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tightfit._torch_private import below_autograd, own_buffers, own_children, own_parameters, set_versions, version_of
from tightfit.device import device_for
from tightfit.step.host_copy import memory_of


@dataclass(frozen=True, slots=True)
class Moves:
    """What a call changes beside what it returns: found by the proof (`module_proof`)."""

    buffers: tuple[int, ...] = ()
    """Places among the module's buffers."""
    random_numbers: bool = False
    """It draws from Python's or NumPy's generator."""


#: Of a call that changes nothing.
NO_MOVES = Moves()


class ModuleState:
    """What a module's call found."""

    __slots__ = ("_contents", "_moves", "_random", "_tables", "buffers")

    def __init__(self, module: torch.nn.Module, moves: Moves) -> None:
        # Each module's own table, and those of its parameters, buffers and children, which are values of that one.
        tables: list[dict[str, Any]] = []
        for below in module.modules():
            tables += (vars(below), own_parameters(below), own_buffers(below), own_children(below))
        self._tables = [(table, dict(table)) for table in tables]
        self._moves = moves
        self.buffers: list[torch.Tensor] = []
        """Those that a call moves."""
        if moves.buffers:
            buffers = list(module.buffers())
            self.buffers = [buffers[place] for place in moves.buffers]
        self._contents = [contents_of(buffer) for buffer in self.buffers]
        self._random = random_numbers() if moves.random_numbers else None

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Put back what the call found, inside; afterwards all is as it was before."""
        now = [(table, dict(table)) for table, _ in self._tables]
        contents = [contents_of(buffer) for buffer in self.buffers]
        versions = [version_of(buffer) for buffer in self.buffers]
        drawn = random_numbers() if self._random is not None else None
        try:
            self._put(self._tables, self._contents, self._random)
            yield
        finally:
            self._put(now, contents, drawn)
            set_versions(self.buffers, versions)

    def _put(self, tables: list[tuple[dict[str, Any], dict[str, Any]]], contents: list[Any], drawn: Any) -> None:
        for table, wanted in tables:
            if not _is_same(table, wanted):
                table.clear()
                table.update(wanted)
        for buffer, content in zip(self.buffers, contents, strict=True):
            set_contents(buffer, content)
        if drawn is not None:
            set_random_numbers(drawn)


def _is_same(table: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return (
        len(table) == len(wanted)
        and all(a is b for a, b in zip(table.values(), wanted.values(), strict=True))
        and table.keys() == wanted.keys()
    )


def contents_of(tensor: torch.Tensor) -> Any:
    """Copy what a tensor's storage holds, on the host outside of PyTorch's allocator."""
    flat = _bytes_of(tensor)
    return memory_of(flat).tobytes() if device_for(tensor).is_host else flat.clone()


def set_contents(tensor: torch.Tensor, contents: Any) -> None:
    """Let a tensor's storage hold what `contents_of` copied; no version counter moves on the host."""
    flat = _bytes_of(tensor)
    if isinstance(contents, torch.Tensor):
        with below_autograd():
            flat.copy_(contents)
    else:
        memory_of(flat).data[:] = contents


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    with below_autograd():
        storage = tensor.untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def random_numbers() -> tuple[Any, Any]:
    """Return the states of Python's and NumPy's generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else None


def set_random_numbers(states: tuple[Any, Any]) -> None:
    """Put the generators back into states that `random_numbers` returned."""
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
