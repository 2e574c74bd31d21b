"""Backwards inside forward that keep their graphs (``create_graph=True``): what they run for nodes of forward counts.

What such a backward runs for a node is an operation of forward like others, since it makes a graph of its own; what it
runs for nodes that a backward made is not.  Nodes are told apart by their positions in autograd's graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from tightfit._torch_private.autograd import (
    backward_keeps_graph,
    call_after_backward,
    current_graph_node,
    graph_position,
    position_of_node,
)
from tightfit.device import Device
from tightfit.profiling.gradient_sums import GradientSums
from tightfit.profiling.observation import RawValue
from tightfit.profiling.saved_tensors import SavedTensors
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import EventKind

#: More nodes than autograd's graph has.
_NO_END = 2**64


class KeptBackwards:
    """Those of one observed step."""

    def __init__(self, ledger: StorageLedger, sums: GradientSums, saved_tensors: SavedTensors, device: Device) -> None:
        self._ledger = ledger
        self._sums = sums
        self._saved_tensors = saved_tensors
        self._device = device
        self._running: list[int] = []  # graph tasks, the innermost last
        self._made: list[range] = []  # positions in autograd's graph of what each of them made
        self._first_node = 0  # of forward
        self._outside: dict[int, int] = {}  # see `from_outside`

    @property
    def are_running(self) -> bool:
        """Whether one runs now."""
        return bool(self._running)

    def begin_forward(self) -> None:
        """Note where forward's nodes begin."""
        self._first_node = graph_position()

    def note_position(self) -> None:
        """Note how far autograd's graph is, for the next event."""
        observation = self._ledger.observation
        observation.positions[len(observation.events)] = graph_position()

    def watch(self, graph_task: int) -> None:
        """Record that a backward has begun inside forward, if it keeps its graph."""
        if graph_task < 0 or graph_task in self._running or not backward_keeps_graph():
            return
        self._running.append(graph_task)
        self._saved_tensors.keeps_graph = True
        self._sums.resolve()
        self.note_position()
        self._made.append(range(graph_position(), _NO_END))
        self._ledger.emit(EventKind.KEEPING, 1)
        call_after_backward(self._end)

    def end(self) -> None:
        """End all: forward is over."""
        while self._running:
            self._end()

    def _end(self) -> None:
        if self._running:  # one that failed ends with the next
            self._sums.resolve()
            self._running.pop()
            self._saved_tensors.keeps_graph = bool(self._running)
            self.note_position()
            began = next(made.start for made in reversed(self._made) if made.stop == _NO_END)
            self._made = [one if one.start != began else range(began, graph_position()) for one in self._made]
            self._ledger.emit(EventKind.KEEPING, 0)

    def node_of_forward(self, graph_task: int) -> int:
        """Return the position of the node of forward that a backward runs which keeps its graph; -1 if none does.

        Nodes that such a backward made itself do not count.
        """
        if not self._running or graph_task != self._running[-1]:
            return -1
        node = current_graph_node()
        if node is None or not (self._device.is_host or len(self._made) == 1):
            return -1  # where backward has a thread of its own, it numbers its own nodes
        position = position_of_node(node)
        of_forward = self._first_node <= position and not any(position in made for made in self._made)
        return position if of_forward else -1

    def from_outside(self, value: int) -> int:
        """Return what stands for a value of forward that a backward got otherwise than as a saved tensor.

        To that backward's region it comes from outside, even if the region has made it (a ``grad_outputs``).
        """
        observation = self._ledger.observation
        op = observation.values[value].op
        if op < 0 or observation.ops[op].node >= 0:
            return value
        found = self._outside.get(value)
        if found is None:
            found = self._outside[value] = len(observation.values)
            observation.values.append(RawValue(storage=observation.values[value].storage))
        return found

    def mutated(self, value: int, inputs: Sequence[int]) -> int:
        """Return by what an operation with these inputs knows a value that it writes."""
        return self._outside.get(value, value) if value not in inputs else value

    def close(self) -> None:
        """Let what stands for values of forward be written when those are."""
        values = self._ledger.observation.values
        for value, outside in self._outside.items():
            values[outside].overwritten = values[value].overwritten
