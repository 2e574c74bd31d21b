"""Know again what was rebuilt for a node of a backward, when that backward saves it for a graph of its own."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit._torch_private.autograd import current_graph_task
from tightfit._torch_private.tensors import WeakStorage, storage_key, version_of


@dataclass(frozen=True, slots=True)
class _Entry:
    handle: weakref.ref[Any]
    storage: WeakStorage
    """Reserves its address."""
    version: int


@dataclass(slots=True)
class Rebuilt:
    """What was rebuilt in the last backward that keeps its graph and makes one (``create_graph=True``)."""

    planned: int = -1
    """The id of the backward inside forward that runs and that the plan knows; -1: none does."""
    _graph_task: int = -1
    _entries: dict[int, _Entry] = field(default_factory=dict)

    def note(self, tensor: torch.Tensor, handle: Any) -> None:
        """Note a tensor that was rebuilt for whoever reads the handle."""
        graph_task = current_graph_task()
        if graph_task != self._graph_task:
            self._graph_task, self._entries = graph_task, {}
        self._entries[storage_key(tensor)] = _Entry(weakref.ref(handle), WeakStorage(tensor), version_of(tensor))

    def handle_of(self, tensor: torch.Tensor) -> Any:
        """Return the handle that a tensor of the running backward was rebuilt for, and that still stands for it."""
        if self._graph_task < 0 or self._graph_task != current_graph_task():
            return None
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return None
        entry = self._entries.get(storage_key(tensor))
        return entry.handle() if entry is not None and entry.version == version_of(tensor) else None

    def forget(self) -> None:
        """Forget everything: no backward of an earlier forward runs."""
        self.planned = self._graph_task = -1
        self._entries = {}
