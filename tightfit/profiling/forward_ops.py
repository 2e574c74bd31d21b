"""The ops of forward as a plan may replay them: what each reads, writes and makes, or why it has to be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tightfit._torch_private.autograd import current_graph_node
from tightfit._torch_private.tensors import storage_key
from tightfit.device import Device
from tightfit.device.placement import device_of_call
from tightfit.operators import replayable as safety
from tightfit.operators.facts import OpInfo, draws, mutated_tensors, result_tensors, undeclared_writes
from tightfit.profiling.checkpoint_calls import CheckpointCalls
from tightfit.profiling.kept_backwards import KeptBackwards
from tightfit.profiling.observation import RawOp
from tightfit.profiling.saved_scalars import saved_scalar_bytes
from tightfit.profiling.saved_tensors import SavedTensors
from tightfit.profiling.signatures import SignatureTable
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.profiling.unseen_writes import UnseenWrites
from tightfit.records import EventKind


class ForwardCall(NamedTuple):
    """A call of an op in forward, as dispatched; `tensors` are those among its arguments.

    `node` is the node of forward's graph that makes the call, or -1.
    """

    func: Any
    info: OpInfo
    types: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[torch.Tensor]
    signature: int
    node: int


class ForwardOps:
    """Records calls of forward, one by one, for an observer."""

    def __init__(
        self,
        ledger: StorageLedger,
        signatures: SignatureTable,
        device: Device,
        backwards: KeptBackwards,
        saved_tensors: SavedTensors,
        checkpoints: CheckpointCalls,
        unseen_writes: UnseenWrites | None,
        is_escaped: Callable[[int], bool],
    ) -> None:
        """`is_escaped` tells whether a value's memory was handed out."""
        self._ledger = ledger
        self._signatures = signatures
        self._backwards = backwards
        self._saved_tensors = saved_tensors
        self._checkpoints = checkpoints
        self._unseen_writes = unseen_writes
        self._is_escaped = is_escaped
        self._random_state_bytes = device.random_state_bytes()
        self._numbers_count = device.is_host  # they are in host memory, whatever they are multiplied with

    def note_reads(self, tensors: list[torch.Tensor]) -> None:
        """Note what an op is about to read, for the model's own checkpoint calls that run."""
        if not self._checkpoints.is_open:
            return
        observation, ledger = self._ledger.observation, self._ledger
        under_hooks = len(observation.ops) in observation.under_hooks
        for tensor in tensors:
            is_new = not ledger.knows(tensor)  # made where no op is seen, and more likely outside
            if (value := ledger.value_of(tensor)) >= 0:
                storage, is_exposed = observation.values[value].storage, self._is_escaped(value)
                self._checkpoints.note_read(storage, is_read_again=is_new or under_hooks, is_exposed=is_exposed)

    def record(self, call: ForwardCall, run: Callable[[], Any]) -> Any:
        """Return what `run` makes of the call, which becomes an op of the observation."""
        observation, ledger, info = self._ledger.observation, self._ledger, call.info
        number = len(observation.ops)
        self.note_reads(call.tensors)
        if self._unseen_writes is not None:
            self._unseen_writes.look_at(call.tensors, number)
        moved = undeclared_writes(info, call.args)  # running statistics, which a replay leaves alone
        inputs = self._inputs(call, moved)
        reason, is_random = self._keep_reason(call, inputs)
        mutated = [t for t in mutated_tensors(info, call.args, call.kwargs) if ledger.counts(t)]
        written = {storage_key(t): t for t in mutated}
        if is_random:
            self._checkpoints.note_random()
        if call.node >= 0 and type(current_graph_node()).__name__ == "CopySlices":
            observation.of_view_writes.add(number)
        op = RawOp(
            name=info.name,
            signature=call.signature,
            inputs=tuple(inputs),
            mutates=tuple(self._backwards.mutated(ledger.value_of(t), inputs) for t in written.values()),
            keep_reason=reason,
            random_state_bytes=self._random_state_bytes if is_random else 0,
            node=call.node,
        )
        result = run()
        results = [t for t in result_tensors(result) if isinstance(t, torch.Tensor)]
        self._signatures.record_result(call.signature, call.tensors, results)
        for tensor in moved:
            ledger.overwrite(tensor)
        for position, tensor in enumerate(written.values()):
            op.outputs.append(ledger.overwrite(tensor, number, -1 - position))
        self._add_results(op, result, info)
        if self._unseen_writes is not None:
            self._unseen_writes.remember([*results, *written.values(), *moved])
        observation.ops.append(op)
        ledger.emit(EventKind.OP, number)
        if self._numbers_count:
            ledger.hold_unseen(saved_scalar_bytes(call.func, call.args, call.tensors))
        return result

    def _inputs(self, call: ForwardCall, moved: list[torch.Tensor]) -> list[int]:
        return [
            value if call.node < 0 or self._saved_tensors.is_unpacked(t) else self._backwards.from_outside(value)
            for t in call.tensors
            if (value := self._ledger.value_of(t)) >= 0 and not any(t is m for m in moved)
        ]

    def _keep_reason(self, call: ForwardCall, inputs: list[int]) -> tuple[str, bool]:
        """Return why a replay could not make the same again ("" if it can), and whether the op draws random numbers."""
        info, args, kwargs, tensors = call.info, call.args, call.kwargs, call.tensors
        device = device_of_call(tensors, kwargs)
        reason = safety.blocker(info, call.types, args, kwargs, tensors, device)
        is_random = draws(info, args, kwargs)
        if not reason and is_random and safety.call_generator(args, kwargs, device) is None:
            reason = "its random state cannot be recorded"
        if not reason and any(self._is_escaped(value) for value in inputs):
            reason = "it reads memory that was handed out (numpy(), data_ptr() and their kin)"
        if not reason and any(self._reads_uninitialised(call, tensor) for tensor in tensors):
            reason = "it reads uninitialised memory"
        return reason, is_random

    def _reads_uninitialised(self, call: ForwardCall, tensor: torch.Tensor) -> bool:
        value = self._ledger.value_of(tensor)
        if value < 0 or not self._ledger.is_uninitialised(value):
            return False
        covers = (
            bool(call.args)
            and tensor is call.args[0]
            and tensor.numel() * tensor.itemsize == self._ledger.nbytes(value)
        )
        return not (call.info.is_full_writer and covers)

    def _add_results(self, op: RawOp, result: Any, info: OpInfo) -> None:
        observation, ledger = self._ledger.observation, self._ledger
        for position, tensor in enumerate(result_tensors(result)):
            if not isinstance(tensor, torch.Tensor):
                continue
            if not ledger.counts(tensor):
                ledger.note_parts(tensor)
                continue
            if ledger.knows(tensor):
                continue  # aliases an argument
            storage = ledger.add(tensor, "activation")
            ledger.emit(EventKind.ALLOC, storage)
            value = observation.storages[storage].current
            observation.values[value].op = len(observation.ops)
            observation.values[value].output = position
            # Uninitialised memory is never read by a replay and never dropped: what fills it later may be invisible.
            observation.values[value].overwritten = info.is_uninitialised
            op.outputs.append(value)
