"""Record opaque calls on a tape: each is one operation, which makes what the operations inside it cannot.

What an `autograd.Function` runs inside is recorded like everything else, and what can be rebuilt from that is.  The
rest (memory that a kernel fills through its address, results of what the tape may not replay) is made by the call
itself, which is then made again as a whole.
"""

from __future__ import annotations

from typing import Any

import torch

from tightfit._torch_private.tensors import storage_key
from tightfit.device.placement import device_of_call, generators_of
from tightfit.operators.facts import describe, opaque_function, tensors_in
from tightfit.operators.function_calls import is_compiled_graph
from tightfit.operators.opaque_calls import FunctionCall, what_it_made
from tightfit.replay.repeats import Repeat
from tightfit.replay.tape import Tape
from tightfit.replay.values import TapedOp, TapedRegion, TapedValue


class OpenCall:
    """An opaque call that is being made."""

    __slots__ = (
        "call", "exposed", "first", "inputs", "is_graph", "is_trusted", "keys", "op", "position", "region",
        "repeat", "saved", "sighted",
    )  # fmt: skip

    def __init__(self, region: TapedRegion, position: int, first: int) -> None:
        self.region = region
        self.position = position
        self.first = first  # of the operations inside, on the tape
        self.call: FunctionCall | None = None
        self.op: TapedOp | None = None
        self.repeat: Repeat | None = None
        self.is_graph = False
        self.is_trusted = False  # its kind was repeated, and only reads the inputs whose addresses it takes
        self.keys: frozenset[int] = frozenset()  # of the arguments' storages
        self.inputs: dict[int, TapedValue] = {}  # by storage
        self.saved: list[torch.Tensor] = []  # while it runs
        self.sighted: set[TapedValue] = set()  # first seen inside
        self.exposed: list[int] = []  # storages whose memory was handed out in it


class OpaqueTape(Tape):
    """A tape that records opaque calls, too."""

    _open: OpenCall | None = None

    @property
    def is_in_call(self) -> bool:
        """Whether an opaque call is being made."""
        return self._open is not None

    @property
    def is_in_graph(self) -> bool:
        """Whether a compiled graph runs, whose operations are no others' concern."""
        return self._open is not None and self._open.is_graph

    def passes(self, func: Any) -> bool:
        """Return whether the plan has no use for the operation that comes now; if so, the tape is past it."""
        return not self.is_in_graph and super().passes(func)

    def begin_call(self, function: Any, args: tuple[Any, ...]) -> None:
        """Note that an opaque call begins; what it runs until `end_call` are operations of their own."""
        region = self._region
        assert region is not None
        kind = opaque_function(function)
        info = describe(kind)
        position = self._position
        record = self._follow_plan(region, kind)[0] and position not in region.refused
        opened = OpenCall(region, position, len(self._ops) + 1)
        opened.is_graph = is_compiled_graph(function)
        tensors = tensors_in(args)
        opened.keys = frozenset([storage_key(tensor) for tensor in tensors if tensor.layout is torch.strided])
        device = device_of_call(tensors, {})
        opened.is_trusted = self._repeats is None or self._repeats.trusts(function, info, args, device)
        if record or not opened.is_trusted:
            call = FunctionCall(function, args, device, generators_of(tensors))
            opened.op = self._record(region, call, info, (), args, {})
            if opened.op is not None:
                opened.call = call
                opened.inputs = {key: self._current[key] for key in opened.keys}
                if not opened.is_trusted and self._repeats is not None:
                    opened.repeat = self._repeats.begin(opened.op, args, {})
        self._open = opened
        self._go_to(position + 1)

    def abort_call(self) -> None:
        """Note that the opaque call has failed."""
        self._open = None

    def end_call(self, result: Any, saved: list[torch.Tensor]) -> None:
        """Note what the opaque call has made: its results, and what it has autograd save at its end."""
        opened, self._open = self._open, None
        assert opened is not None
        op, call = opened.op, opened.call
        if self._region is not opened.region:
            return
        made = what_it_made(result, [*opened.saved, *saved])
        if op is None or call is None:
            if opened.is_trusted:  # the plan has no use for it; what it made others may read, as when it is recorded
                self._take_back(opened, made)
            return
        call.made(made)
        opaque = {place: tensor for place, tensor in enumerate(made) if self._is_opaque(tensor, opened, op)}
        if not opaque:
            return
        if opened.repeat is not None and not opened.repeat.agrees(tuple(made)):
            opened.repeat.refuse(opened.region, opened.position)
            self.statistics.refused_ops += 1
            self._forget_contents(opened.repeat.changed_inputs())
            return
        self._take_back(opened, made)
        for place, tensor in opaque.items():
            value = self._current.get(storage_key(tensor))
            if value is None or value.op is not op:  # two of them may be one
                self._new_value(op, storage_key(tensor), tensor, place)

    def _take_back(self, opened: OpenCall, made: list[torch.Tensor]) -> None:
        """Note of memory that was handed out inside a call that it was only read, or written before it was handed on.

        That is known of the call's arguments and of what it made.
        """
        if not opened.exposed:
            return
        known = {storage_key(tensor) for tensor in made if tensor.layout is torch.strided} | opened.keys
        for key in opened.exposed:
            if key in known:
                self._writes.exposed.pop(key, None)
            if key in opened.inputs:
                self._current[key] = opened.inputs[key]

    def note_exposed(self, tensor: torch.Tensor) -> bool:
        """Note that memory is handed out; tell whether an opaque call took it that is known only to read its inputs."""
        opened = self._open
        if opened is None:
            return False
        key = storage_key(tensor)
        value = self._current.get(key)
        if opened.is_trusted and key in opened.keys and (value is None or not self._is_inside(value, opened)):
            return True
        if key not in self._writes.exposed:
            opened.exposed.append(key)
        return False

    def pack(self, tensor: torch.Tensor) -> Any:
        """Return what autograd shall hold instead of a tensor that it saves."""
        if self._open is not None:
            self._open.saved.append(tensor)
        return super().pack(tensor)

    def _sight(self, tensor: torch.Tensor) -> TapedValue:
        known = self._current.get(storage_key(tensor))
        value = super()._sight(tensor)
        if self._open is not None and value is not known:
            self._open.sighted.add(value)
        return value

    def _is_inside(self, value: TapedValue, opened: OpenCall) -> bool:
        return value.op is not None and value.op.order >= opened.first

    def _is_opaque(self, tensor: torch.Tensor, opened: OpenCall, op: TapedOp) -> bool:
        """Tell whether only the call itself can make this tensor."""
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return False
        key = storage_key(tensor)
        value = self._current.get(key)
        if key in opened.inputs:  # even if its memory was handed out: the call is not repeated unless it is unchanged
            return False
        if value is None:
            return True
        if value in op.inputs:
            return False
        if self.check is not None and not self.check.unchanged(value, tensor):
            del self._current[key]
            return True
        if value.op is None:
            return value in opened.sighted or key in opened.exposed
        return self._is_inside(value, opened) and (value.uninitialised or key in opened.exposed)
