"""The dispatch mode that records what a real step holds: each storage, who made it, and when it goes.

The step runs as it is: nothing that autograd saves is touched, and nothing is run again.
"""

from __future__ import annotations

import bisect
import gc
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from tightfit._torch_private.autograd import current_graph_node, current_graph_task, graph_position, position_of_node
from tightfit._torch_private.dispatch import DispatchMode, FakeTensor, top_dispatch_mode
from tightfit._torch_private.tensors import is_allocated
from tightfit.device import Device
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.device.tensor_parts import stored_in
from tightfit.explanation.breakdown import BATCH, LOSS, OPTIMIZER, OTHER, Breakdown, Tally, largest_first
from tightfit.operators.facts import describe, result_tensors, tensors_in
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import Event, EventKind

#: A module, or the name of an owner that is none.
Owner = torch.nn.Module | str


class MemoryRecorder(DispatchMode):
    """Records what is held on one device, from `start` on."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._ledger = StorageLedger(device)
        self._ledger.before_event = self._before_event
        self._contexts = ExitStack()
        self._meter = self._contexts.enter_context(device.workspace_meter())
        self._owners: list[Owner] = []  # by storage: who made it
        self._labels: dict[int, tuple[Owner, str]] = {}  # by storage: what it is, where that is known
        self._moments: list[tuple[str, Owner]] = []  # by operation
        self._backward_begins: list[int] = []  # places in the events
        self._boundaries: list[tuple[int, Owner]] = []  # (number of an autograd node, owner of it and those after it)
        self._open_modules: list[torch.nn.Module] = []
        self._depth_outside = 0
        self._in_backward = self.in_optimizer = False
        self._last_owner: Owner = LOSS
        self._working = False
        self.failed: str = ""
        """What asked for memory that there was not, in words."""
        self._failed_place = 0
        self.when_failed: Callable[[], None] = lambda: None
        """Called when memory has run out, before anybody catches the error."""

    # ------------------------------------------------------------------------------------------------ recording

    def start(self) -> None:
        """Begin, with all tensors that there are."""
        self._ledger.is_open = True
        for tensor in _all_tensors():
            self._see(tensor)
        for storage in range(len(self._owners)):
            self._labels[storage] = OTHER, "other"
        self.activate()

    def stop(self) -> None:
        """End; what was recorded can be asked for then."""
        if self._ledger.is_open:
            self._ledger.is_open = False
            if top_dispatch_mode() is self:  # else a mode of the script's was opened before and closed since
                self.deactivate()
            self._contexts.close()

    def pause(self) -> None:
        """Record nothing any more, in a process that was forked."""
        self._ledger.is_open = False

    def enter(self, module: torch.nn.Module) -> None:
        """Note that a module is called."""
        self._open_modules.append(module)
        self._boundary(module)

    def exit(self) -> None:
        """Note that the innermost call has ended."""
        self._open_modules.pop()
        self._boundary(self._open_modules[-1] if self._open_modules else LOSS)

    def _boundary(self, owner: Owner) -> None:
        if not self._in_backward:
            self._boundaries.append((graph_position(), owner))

    def begin_backward(self) -> None:
        """Note that a backward begins."""
        self._in_backward = True
        self._depth_outside = len(self._open_modules)
        self._last_owner = LOSS
        self._backward_begins.append(len(self._ledger.observation.events))

    def end_backward(self) -> None:
        """Note that it has ended."""
        self._in_backward = False
        self._boundaries = [(0, self._owner())]

    def label(self, tensor: torch.Tensor, component: str, owner: Owner) -> None:
        """Say what a tensor is, for as long as it lives."""
        for part in stored_in(tensor):
            if (storage := self._see(part)) >= 0:
                self._labels[storage] = owner, component

    def label_batch(self, tensor: torch.Tensor) -> None:
        """Say that a tensor is a part of the batch, unless a module has made its memory."""
        for part in stored_in(tensor):
            if (storage := self._see(part)) >= 0 and isinstance(self._owners[storage], str):
                self._labels.setdefault(storage, (BATCH, "batch"))
                if self._labels[storage][1] == "other":
                    self._labels[storage] = BATCH, "batch"

    @property
    def place(self) -> int:
        """How many events there were so far."""
        return len(self._ledger.observation.events)

    def forget_failure(self) -> None:
        """Forget that memory ran out."""
        self.failed = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._ledger.is_open or self._working:
            return func(*args, **kwargs)
        if describe(func).is_view:
            return func(*args, **kwargs)
        self._last_owner = owner = self._owner()
        number = len(self._moments)
        self._moments.append((self._phase(), owner))
        try:
            with self._meter.watch(number):
                result = func(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and not self.failed:
                self.failed = f"{describe(func).name}: {error}"
                self._failed_place = self.place
                self.when_failed()
            raise
        for tensor in tensors_in((*args, *kwargs.values())):
            self._see(tensor)
        for tensor in result_tensors(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        self._ledger.emit(EventKind.OTHER_OP, number)
        return result

    def _see(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor's storage, which may be new; -1 if its memory does not count."""
        self._working = True
        try:
            found = -1
            for part in stored_in(tensor):
                if self._ledger.counts(part) and (self._ledger.knows(part) or is_allocated(part)):
                    found = self._ledger.observation.values[self._ledger.value_of(part)].storage
            return found
        finally:
            self._working = False

    def _before_event(self, kind: EventKind) -> None:
        if kind == EventKind.ALLOC:
            self._owners.append(self._last_owner)

    def _phase(self) -> str:
        return "optimizer" if self.in_optimizer else "backward" if self._in_backward else "forward"

    def _owner(self) -> Owner:
        if self.in_optimizer:
            return OPTIMIZER
        if not self._in_backward:
            return self._open_modules[-1] if self._open_modules else LOSS
        if len(self._open_modules) > self._depth_outside:  # a checkpointed forward, again
            return self._open_modules[-1]
        node = current_graph_node() if current_graph_task() >= 0 else None
        if node is None:
            return self._last_owner
        number = position_of_node(node)
        place = bisect.bisect_right(self._boundaries, number, key=lambda boundary: boundary[0])
        if place == len(self._boundaries) and number > graph_position():
            return self._last_owner  # a leaf's gradient
        return self._boundaries[place - 1][1] if place else LOSS

    # ------------------------------------------------------------------------------------------------ what was found

    @property
    def peak_place(self) -> int:
        """When the peak was, as a place in the events; ask after `stop`."""
        return self._peak()[0]

    def _events(self) -> list[Event]:
        return [event for event in self._ledger.observation.events if isinstance(event, Event)]

    def _nbytes(self) -> list[int]:
        return [storage.nbytes for storage in self._ledger.observation.storages]

    def _peak(self) -> tuple[int, int, int]:
        """Return when the peak was, in which operation (-1: between two), and that one's workspace."""
        if self.failed:
            return self._failed_place - 1, -1, 0
        workspace, nbytes_of = self._meter.workspace_bytes(), self._nbytes()
        peak = -1
        found = 0, -1, 0
        level = 0
        for place, (kind, a) in enumerate(self._events()):
            if kind == EventKind.ALLOC:
                level += nbytes_of[a]
            elif kind == EventKind.FREE:
                level -= nbytes_of[a]
            inside = workspace.get(a, 0) if kind == EventKind.OTHER_OP else 0
            if level + inside > peak:
                peak = level + inside
                found = place, a if kind == EventKind.OTHER_OP else -1, inside
        return found

    def breakdown(self, name_of: Callable[[Owner], str]) -> Breakdown:
        """Return who held what at the peak, or where memory ran out, at that moment; ask after `stop`."""
        nbytes_of, events = self._nbytes(), self._events()
        peak_place, peak_operation, workspace_bytes = self._peak()
        operation = peak_operation if peak_operation >= 0 else self._operation_after(events, peak_place)
        phase, owner = self._moments[operation] if self._moments else ("forward", LOSS)
        tally = Tally()
        for storage in _alive(events[: peak_place + 1]):
            holder, component = self._labels.get(storage, (self._owners[storage], "activations"))
            tally.add(name_of(holder), component, nbytes_of[storage])
        tally.add(name_of(owner), "workspace", workspace_bytes)
        moment = "optimizer step" if phase == "optimizer" else name_of(owner)
        return Breakdown(
            moment=f"backward of {moment}" if phase == "backward" else moment,
            parts=tally.parts(),
            held_for_backward=self._held_for_backward(events, peak_place, nbytes_of, name_of),
        )

    def _operation_after(self, events: list[Event], place: int) -> int:
        """Return the operation that ran at an event: the next one that ended, else the last one that began."""
        for kind, a in events[place:]:
            if kind == EventKind.OTHER_OP:
                return a
        return len(self._moments) - 1

    def _held_for_backward(
        self, events: list[Event], peak_place: int, nbytes_of: list[int], name_of: Callable[[Owner], str]
    ) -> dict[str, int]:
        """Return what forward had made and was there when the backward of the peak's pass began, by owner."""
        begins = [place for place in self._backward_begins if place <= peak_place]
        later = [place for place in self._backward_begins if place > peak_place]
        at = later[0] if later and self._phase_at(events, peak_place) == "forward" else begins[-1] if begins else None
        if at is None:
            return {}
        held: Counter[str] = Counter()
        for storage in _alive(events[:at]):
            if storage not in self._labels and self._owners[storage] != OPTIMIZER:
                held[name_of(self._owners[storage])] += nbytes_of[storage]
        return largest_first(held)

    def _phase_at(self, events: list[Event], place: int) -> str:
        return self._moments[self._operation_after(events, place)][0]


def _alive(events: Iterable[Event]) -> list[int]:
    found: dict[int, None] = {}
    for kind, a in events:
        if kind == EventKind.ALLOC:
            found[a] = None
        elif kind == EventKind.FREE:
            found.pop(a, None)
    return list(found)


def _all_tensors() -> list[torch.Tensor]:
    """List all tensors that Python knows of, and the gradients of those that are leaves."""
    # Not isinstance, which asks an object for its class: some answer by importing what they stand for.
    found: list[torch.Tensor] = [
        thing for thing in gc.get_objects() if issubclass(kind := type(thing), torch.Tensor) and kind is not FakeTensor
    ]
    gradients = [tensor.grad for tensor in found if tensor.is_leaf and tensor.requires_grad and tensor.grad is not None]
    return found + gradients
