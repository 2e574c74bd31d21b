"""Follow the backwards that run inside a forward: which region's nodes they run, and on which tape that is recorded."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

import torch

from tightfit._torch_private.autograd import (
    call_after_backward,
    current_graph_node,
    current_graph_task,
    graph_position,
    position_of_node,
)
from tightfit.replay.copied_tape import CopiedTape
from tightfit.replay.plan_state import PlanState
from tightfit.replay.tape import Tape
from tightfit.replay.values import TapedRegion

#: The tape of a region, and the region on it.
_Maker = tuple[Tape, TapedRegion]


class BackwardsInside:
    """The backwards inside one forward, and the regions whose nodes they run."""

    def __init__(self, state: PlanState) -> None:
        self._state = state
        self._thread = threading.get_ident()
        self._planned: dict[int, bool] = {}  # by graph task: whether the plan knows it
        self._count = 0  # of planned ones
        # From which position in autograd's graph on nodes are of which region.
        self._positions: list[int] = [0]
        self._makers: list[_Maker | None] = [None]
        self._next: _Maker | None = None  # the region that runs when the backward has ended
        self._copies: dict[TapedRegion, CopiedTape] = {}  # for the backward that runs
        self._asked: tuple[int, CopiedTape | None] = (-1, None)  # the last node that was asked for

    def is_new(self) -> bool:
        """Return whether the backward that runs was not heard of yet."""
        return current_graph_task() not in self._planned

    def is_planned(self) -> bool:
        """Return whether the backward that runs is one that the plan knows."""
        return self._planned.get(current_graph_task(), False)

    def begin(self, *, is_planned: bool) -> None:
        """Note that a backward has begun."""
        graph_task = current_graph_task()
        self._planned[graph_task] = is_planned
        if is_planned:
            self._end()
            self._note(None)
            self._state.rebuilt.planned, self._next = graph_task, None
            self._count += 1
            call_after_backward(self._end)

    def _end(self) -> None:
        """Note that the backward has ended: the nodes that it made are of no region."""
        if self._state.rebuilt.planned < 0:
            return
        self._state.rebuilt.planned = -1
        copies, self._copies = self._copies, {}
        self._asked = (-1, None)
        for copy in copies.values():  # unless that was done at the backward's end
            copy.seal()
        self._note(self._next)

    def close(self) -> None:
        """Note that forward is over, by an error perhaps."""
        self._end()
        self._makers, self._next = [None], None
        self._positions = [0]

    def begin_region(self, tape: Tape | None = None) -> None:
        """Note that a region begins or goes on, which is recorded on that tape if its plan says anything about it."""
        maker = (tape, tape.region) if tape is not None and tape.region is not None else None
        if self._state.rebuilt.planned >= 0:
            self._next = maker
        else:
            self._note(maker)

    def _note(self, maker: _Maker | None) -> None:
        position = graph_position()
        if self._positions[-1] == position:
            self._makers[-1] = maker
        else:
            self._positions.append(position)
            self._makers.append(maker)

    def about_to_write(self, tensors: Sequence[torch.Tensor], by: CopiedTape | None) -> None:
        """Note that the contents of tensors are about to change, `by` an operation that this tape records."""
        for copy in self._copies.values():
            for tensor in tensors if copy is not by else ():
                copy.about_to_write(tensor)

    def tape_of_node(self) -> CopiedTape | None:
        """Return the tape for what the node does now that the planned backward runs; None if that is kept."""
        if current_graph_task() != self._state.rebuilt.planned:
            return None
        node = current_graph_node()
        if node is None or (self._count > 1 and threading.get_ident() != self._thread):
            return None  # a thread of backward's own numbers its own nodes
        position = position_of_node(node)
        known, tape = self._asked
        if position != known:
            maker = self._makers[bisect_right(self._positions, position) - 1]
            tape = self._tape_for(*maker) if maker is not None and maker[1].has_more else None
            self._asked = position, tape
        return tape

    def _tape_for(self, tape: Tape, region: TapedRegion) -> CopiedTape:
        copy = self._copies.get(region)
        if copy is None:
            state = self._state
            repeats = state.repeats if state.self_check else None
            with tape.lock:
                copy = CopiedTape.of(tape, state.rebuilt.planned, state.writes, repeats)
            copy.resume(region)
            self._copies[region] = copy
        return copy
