"""Observe opaque calls: each is one operation, which makes what the operations inside it cannot.

As on a tape (`tightfit.replay.opaque_tape`), so that a profile's operations are those of a planned step.  Where the
step runs with data, the call is made again at once: a plan may only count on calls that give the same bits, and what
they cost is not to be learned from made-up data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tightfit._torch_private.tensors import storage_key
from tightfit.device import Device
from tightfit.device.placement import device_of_call, generators_of
from tightfit.operators import replayable as safety
from tightfit.operators.facts import describe, opaque_function, tensors_in
from tightfit.operators.function_calls import is_compiled_graph
from tightfit.operators.opaque_calls import FunctionCall, what_it_made
from tightfit.profiling.costs_in_place import cost_of_opaque
from tightfit.profiling.observation import Observation, RawOp
from tightfit.profiling.signatures import SignatureTable
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.records import EventKind
from tightfit.replay.repeats import Repeat, Repeats
from tightfit.replay.values import TapedOp, TapedRegion

#: As in `tightfit.planning.search`.
_DIFFERS = "self-check: a second call gave other bits or changed inputs"


class ObservedCalls:
    """The opaque calls of an observed step.

    Args:
        ledger: the step's storages.
        signatures: the table that calls are added to.
        device: whose memory counts.
        has_data: the step runs with data.
        escape: notes that a tensor may be written at any moment, unseen.
    """

    def __init__(
        self,
        ledger: StorageLedger,
        signatures: SignatureTable,
        device: Device,
        has_data: bool,
        escape: Callable[[torch.Tensor], None],
    ) -> None:
        self._ledger = ledger
        self._signatures = signatures
        self._device = device
        self._has_data = has_data
        self._escape = escape
        self._repeats = Repeats()
        self._open: _Open | None = None

    @property
    def is_open(self) -> bool:
        """Whether a call is being made."""
        return self._open is not None

    @property
    def is_in_graph(self) -> bool:
        """Whether a compiled graph runs, whose operations are no others' concern."""
        return self._open is not None and self._open.is_graph

    def begin(self, function: Any, args: tuple[Any, ...]) -> None:
        """Note that a call begins."""
        kind = opaque_function(function)
        info = describe(kind)
        tensors = tensors_in(args)
        device = device_of_call(tensors, {})
        reason = safety.blocker(info, (), args, {}, tensors, device, function)
        inputs = [value for tensor in tensors if (value := self._ledger.value_of(tensor)) >= 0]
        if not reason and any(self._ledger.is_uninitialised(value) for value in inputs):
            reason = "it reads uninitialised memory"
        op = RawOp(
            name=info.name,
            signature=self._signatures.add(kind, args, {}),
            inputs=tuple(inputs),
            mutates=(),
            keep_reason=reason,
            random_state_bytes=0,
        )
        opened = _Open(self._ledger.observation, op, args, is_compiled_graph(function))
        if not reason and self._has_data:
            opened.call = call = FunctionCall(function, args, device, generators_of(tensors))
            taped = TapedOp(TapedRegion(None, set()), 0, 0, 0, call, info)
            opened.repeat = self._repeats.begin(taped, args, {})
        self._ledger.observation.ops.append(op)
        self._ledger.emit(EventKind.OP, opened.place)
        self._open = opened

    def abort(self) -> None:
        """Note that the call has failed."""
        self._open = None

    def end(self, result: Any, saved: list[torch.Tensor]) -> None:
        """Note what the call has made: its results, and what it has autograd save at its end."""
        opened, self._open = self._open, None
        assert opened is not None
        op = opened.op
        made = what_it_made(result, [*opened.saved, *saved])
        opaque = {place: value for place, tensor in enumerate(made) if (value := self._opaque(tensor, opened)) >= 0}
        if opaque and opened.call is not None:
            self._try(opened, opened.call, made)
        if not opaque or op.keep_reason:  # who has the addresses may write there at any moment
            for tensor in (*opened.escaped, *opened.escaped_inside.values()):
                self._escape(tensor)
        observation = self._ledger.observation
        for place, value in opaque.items():
            record = observation.values[value]
            if record.op == opened.place:
                continue  # two of them are one
            if record.op >= 0:
                observation.ops[record.op].outputs.remove(value)
            record.op, record.output, record.overwritten = opened.place, place, False
            op.outputs.append(value)

    def _try(self, opened: _Open, call: FunctionCall, made: list[torch.Tensor]) -> None:
        """Make the call again, to know whether a plan may, and what that costs."""
        op = opened.op
        call.made(made)
        op.random_state_bytes = call.random_state_bytes
        if opened.repeat is not None and not opened.repeat.agrees(tuple(made)):
            op.keep_reason = _DIFFERS
        elif op.signature not in self._signatures.measured:
            described = self._signatures.calls[op.signature]
            self._signatures.measured[op.signature] = cost_of_opaque(described, call, opened.args, self._device)

    def escapes(self, tensor: torch.Tensor) -> bool:
        """Note that memory is handed out; tell whether the call's end decides what that means."""
        opened = self._open
        if opened is None:
            return False
        value = self._ledger.value_of(tensor)
        storage = self._ledger.observation.values[value].storage
        if storage >= opened.first_storage:
            opened.escaped_inside[storage] = tensor
            self._ledger.overwrite(tensor)
        elif storage_key(tensor) in opened.keys:
            opened.escaped.append(tensor)
        else:
            return False  # its contents are not compared
        return True

    def is_escaped(self, storage: int) -> bool:
        """Tell whether the call that is being made has handed out memory that it has made."""
        return self._open is not None and storage in self._open.escaped_inside

    def note_saved(self, tensor: torch.Tensor) -> None:
        """Note what autograd saves."""
        if self._open is not None:
            self._open.saved.append(tensor)

    def _opaque(self, tensor: torch.Tensor, opened: _Open) -> int:
        """Return the value of a tensor that only the call itself can make; -1 if it is another's."""
        observation = self._ledger.observation
        value = self._ledger.value_of(tensor) if type(tensor) in safety.PLAIN_TYPES else -1
        if value < 0 or observation.values[value].storage < opened.first_storage:
            return -1
        record = observation.values[value]
        if observation.storages[record.storage].component != "activation":
            return -1
        unknown = record.op < opened.place or record.op < 0 or bool(observation.ops[record.op].keep_reason)
        handed_out = record.storage in opened.escaped_inside
        return value if unknown or handed_out or self._ledger.is_uninitialised(value) else -1


class _Open:
    """A call that is being made."""

    def __init__(self, observation: Observation, op: RawOp, args: tuple[Any, ...], is_graph: bool) -> None:
        self.op = op
        self.is_graph = is_graph
        self.args = args
        self.keys = {storage_key(tensor) for tensor in tensors_in(args) if tensor.layout is torch.strided}
        self.place = len(observation.ops)
        self.first_storage = len(observation.storages)
        self.call: FunctionCall | None = None
        self.repeat: Repeat | None = None
        self.saved: list[torch.Tensor] = []
        self.escaped: list[torch.Tensor] = []
        """Arguments whose memory was handed out in the call."""
        self.escaped_inside: dict[int, torch.Tensor] = {}
        """The same of tensors that the call has made, by storage."""
