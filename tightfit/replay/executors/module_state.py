"""Hold the state in which a module was called, so that a second call finds it, and leaves what is there by then.

What modules have as attributes, buffers that a call moves (running statistics), and the random numbers of Python and
NumPy.  PyTorch's own generators are the executor's matter.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from operator import is_
from typing import Any

import torch

from tightfit._torch_private.dispatch import below_autograd
from tightfit._torch_private.modules import own_buffers, own_children, own_parameters
from tightfit._torch_private.tensors import set_versions, version_of
from tightfit.device import device_for
from tightfit.step.host_copy import memory_of
from tightfit.step.snapshot import same_state


@dataclass(frozen=True, slots=True)
class Moves:
    """What a call changes beside what it returns: found by the proof (`module_proof`)."""

    buffers: tuple[int, ...] = ()
    """Places among the module's buffers."""
    random_numbers: bool = False
    """It draws from Python's or NumPy's generator."""


#: How many attributes there are in each table of a module's, and all names and values, one table after another.
_Attributes = tuple[list[int], list[str], list[Any]]

#: Of a call that changes nothing.
NO_MOVES = Moves()


class ModuleState:
    """What a module's call found."""

    __slots__ = ("_contents", "_found", "_moves", "_random", "_tables", "buffers")

    def __init__(self, module: torch.nn.Module, below: Sequence[torch.nn.Module], moves: Moves) -> None:
        """Note what the module and all `below` it (itself among them) have."""
        # Each module's own table, and those of its parameters, buffers and children, which are values of that one.
        self._tables: list[dict[str, Any]] = []
        for one in below:
            self._tables += (vars(one), own_parameters(one), own_buffers(one), own_children(one))
        self._found = self._now()
        self._moves = moves
        self.buffers: list[torch.Tensor] = []
        """Those that a call moves."""
        if moves.buffers:
            buffers = list(module.buffers())
            self.buffers = [buffers[place] for place in moves.buffers]
        self._contents = [contents_of(buffer) for buffer in self.buffers]
        self._random = random_numbers() if moves.random_numbers else None

    def found(self, tensor: torch.Tensor, contents: bytes) -> None:
        """Note what the call found in a tensor that it, or somebody else, was not known to move."""
        self.buffers.append(tensor)
        self._contents.append(contents)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Put back what the call found, inside; afterwards all is as it was before."""
        # Usually the tables are as they were found.
        now = None if self._are_as(self._found) else self._now()
        contents = [contents_of(buffer) for buffer in self.buffers]
        versions = [version_of(buffer) for buffer in self.buffers]
        drawn = random_numbers() if self._random is not None else None
        try:
            if now is not None:
                self._put_tables(self._found)
            self._put(self._contents, self._random)
            yield
        finally:
            self._put_tables(self._found if now is None else now)
            self._put(contents, drawn)
            set_versions(self.buffers, versions)

    def _now(self) -> _Attributes:
        tables = self._tables
        values = list(chain.from_iterable(map(dict.values, tables)))
        return list(map(len, tables)), list(chain.from_iterable(tables)), values

    def _are_as(self, wanted: _Attributes) -> bool:
        """Tell whether all modules have these attributes, in one go: most have some twenty, and each is looked at."""
        lengths, names, values = wanted
        return (
            list(map(len, self._tables)) == lengths
            and list(chain.from_iterable(self._tables)) == names
            and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), values))
        )

    def _put_tables(self, wanted: _Attributes) -> None:
        if self._are_as(wanted):
            return
        lengths, names, values = wanted
        pairs = zip(names, values, strict=True)
        for table, length in zip(self._tables, lengths, strict=True):
            table.clear()
            table.update(islice(pairs, length))

    def _put(self, contents: list[Any], drawn: Any) -> None:
        for buffer, content in zip(self.buffers, contents, strict=True):
            set_contents(buffer, content)
        if drawn is not None:
            set_random_numbers(drawn)


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


def same_random_numbers(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Tell whether two states that `random_numbers` returned would give the same numbers."""
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or all(map(same_state, a[1], b[1]))


def set_random_numbers(states: tuple[Any, Any]) -> None:
    """Put the generators back into states that `random_numbers` returned."""
    random.setstate(states[0])
    if states[1] is not None:
        sys.modules["numpy"].random.set_state(states[1])
