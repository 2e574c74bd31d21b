"""The dispatch mode that records one training step: its ops, what they allocate, and when memory is released.

It works on fake tensors (shapes without data) and on real ones.  Autograd holds a placeholder instead of each saved
tensor (for a real tensor the bytes go to a file), see `saved_tensors`.  The deaths of storages and of placeholders give
the lifetimes in the plain step and under any plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch

from tightfit._torch_private.autograd import (
    current_graph_task,
    top_saved_tensor_hooks,
)
from tightfit._torch_private.compiling import never_compiled
from tightfit._torch_private.dispatch import (
    DEVICE,
    LOCAL_SCALAR,
    DispatchMode,
    FakeTensorMode,
    fake_device_of,
    is_traced,
    top_dispatch_mode,
)
from tightfit._torch_private.fake_calls import CallKey, FakeCalls
from tightfit.device import Device
from tightfit.device.tensor_parts import stored_in
from tightfit.distributed.dtensor import is_dtensor
from tightfit.operators._checkpoint_private import CheckpointCall
from tightfit.operators.asking_for_modes import leave_modes_if_asked
from tightfit.operators.checkpoint_calls import checkpoint_path
from tightfit.operators.compiled_calls import CompiledCalls
from tightfit.operators.facts import (
    describe,
    mutated_tensors,
    result_tensors,
    tensors_in,
)
from tightfit.operators.function_calls import WatchedFunctions, arguments_of, can_be_made_again, saved_by
from tightfit.operators.stashed_tensors import hold_otherwise
from tightfit.operators.wrapper_tensors import any_wrapper
from tightfit.profiling.checkpoint_calls import CheckpointCalls
from tightfit.profiling.costs_in_place import cost_where_it_runs
from tightfit.profiling.forward_ops import ForwardCall, ForwardOps
from tightfit.profiling.gradient_sums import GradientSums
from tightfit.profiling.kept_backwards import KeptBackwards
from tightfit.profiling.known_values import KnownValues
from tightfit.profiling.observation import ModuleEvent, Observation
from tightfit.profiling.observed_calls import ObservedCalls
from tightfit.profiling.output_strides import Layouts, layouts_of, with_layouts
from tightfit.profiling.saved_tensors import CHECKPOINTING, SavedTensors, owner_of_hook
from tightfit.profiling.signatures import SignatureTable
from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.profiling.unseen_writes import UnseenWrites
from tightfit.records import EventKind
from tightfit.step.exclude import is_inside


class Observer(DispatchMode):
    """Records the ops, storages and events of a step between `start` and `stop`."""

    def __init__(
        self,
        signatures: SignatureTable,
        device: Device,
        spill: Callable[[torch.Tensor], Any] | None = None,
        unspill: Callable[[Any], torch.UntypedStorage] | None = None,
        layouts: Mapping[str, Layouts] | None = None,
        left_checkpoints: Mapping[str, str] | None = MappingProxyType({}),
        excluded: Sequence[str] = (),
        *,
        runs_native_code: bool = False,
        mode: FakeTensorMode | None = None,
    ) -> None:
        """Prepare to record a step.

        Args:
            signatures: the table to which distinct ops are added.
            device: the device whose memory counts.
            spill, unspill: move a saved tensor's storage out of memory and back; None on fake tensors.
            layouts: the real kernels' result layouts, by the key of the signature, where the fake kernels are wrong.
            left_checkpoints: checkpointed functions of the model's that are left to PyTorch, and why; None: all are.
            excluded: paths of the modules that are left untouched.
            runs_native_code: it runs code that takes addresses, and may write there unseen.
            mode: of the tensors without data that the step runs on.
        """
        super().__init__()
        self._ledger = ledger = StorageLedger(device)
        self._unseen_writes = UnseenWrites(ledger) if runs_native_code else None
        self._sums = GradientSums(ledger)
        self._saved_tensors = SavedTensors(ledger, self._unrecorded, spill, unspill)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._backwards = KeptBackwards(ledger, self._sums, self._saved_tensors, device)
        self.in_optimizer = False
        self._in_backward = False
        self._unrecorded_depth = 0
        self._memory_only_depth = 0
        self._in_observer = False  # our own code asks for storages, too, which is no escape of memory
        self._escaped: set[int] = set()  # storages whose memory was handed out by numpy(), data_ptr(), ...
        self._calls = ObservedCalls(ledger, signatures, device, unspill is not None, self._escapes)
        self._functions = WatchedFunctions(self._call_function)
        self._compiled = CompiledCalls(has_data=unspill is not None)
        self._signatures = signatures
        self.random_state_bytes = device.random_state_bytes()
        """What a copy of the default generator's state takes of the memory that counts."""
        self.switched_off: set[str] = set()
        """Who keeps a part of the step from being recomputed; as `Profile.switched_off`."""
        self.under_hooks: set[str] = set()
        """Paths of modules in whose calls somebody else's saved-tensor hooks are active."""
        self.checkpoints = CheckpointCalls(left_checkpoints)
        """The model's own calls of `torch.utils.checkpoint`."""
        ledger.before_write = self.checkpoints.note_write
        self._excluded = excluded
        self._open_paths: list[str] = []  # of the module calls that run now, the outermost first
        self._forward_ops = ForwardOps(
            ledger, signatures, device, self._backwards, self._saved_tensors, self.checkpoints, self._unseen_writes,
            self._is_escaped,
        )  # fmt: skip
        self.margin_bytes = 0
        """Bytes that a step may take beyond what is observed here."""
        self.known_values: KnownValues | None = None
        """What tensors without data would hold; None: they are not asked for it."""
        self._has_data = unspill is not None
        self._fakes = FakeCalls(mode)
        self._device = device
        self._real_layouts = layouts or {}
        self.layouts: dict[str, Layouts] = {}
        """Result layouts as observed, by the key of the signature."""

    @property
    def saw_compiled_calls(self) -> bool:
        """Whether the step called what `torch.compile` made."""
        return self._compiled.seen

    @property
    def observation(self) -> Observation:
        """The tables of what was recorded so far."""
        return self._ledger.observation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # As in `replay.session.Session`: otherwise every op pays for a wrapper that only torch.compile needs.
        return False

    # ------------------------------------------------------------------------------------------------ for the caller

    def add_resident(self, tensor: torch.Tensor, component: str) -> None:
        """Count the tensor's storage as alive during the whole step."""
        for part in stored_in(tensor):
            if self._ledger.counts(part) and not self._ledger.knows(part):
                self._ledger.add(part, component)

    def start(self) -> None:
        """Begin to record."""
        self._hooks.__enter__()
        self.activate()
        self._functions.start()
        self._compiled.start()
        self._backwards.begin_forward()
        self._ledger.is_open = True

    def stop(self) -> None:
        """Stop recording."""
        self._sums.resolve()
        self._backwards.close()
        self._ledger.is_open = False
        self._functions.stop()
        self._compiled.stop()
        self.deactivate()
        self._hooks.__exit__(None, None, None)

    @contextmanager
    def memory_only(self) -> Iterator[None]:
        """Count the memory of the ops inside, but record no op that a plan could replay.

        For FSDP2's all-gathers and gradient reductions, which are not the model's.
        """
        self._memory_only_depth += 1
        try:
            yield
        finally:
            self._memory_only_depth -= 1

    def add_resizable(self, tensor: torch.Tensor) -> None:
        """Add a tensor with an empty storage, which will be allocated and freed in place (see `resized`).

        To the model it is a parameter: always there, never saved.
        """
        assert tensor.untyped_storage().nbytes() == 0
        self.add_resident(tensor, "parameters")

    def resized(self, tensor: torch.Tensor) -> None:
        """Record that a resizable tensor's storage was allocated or freed."""
        if self._ledger.is_open:
            self._ledger.resize(tensor)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Run ops unrecorded, but with the results of an observed run (see `LOCAL_SCALAR` in `__torch_dispatch__`)."""
        with self:
            yield

    def mark_escaped(self, tensor: torch.Tensor) -> None:
        """Record that the tensor's memory was handed out: from now on it may be written at any moment, unseen."""
        forward = self._ledger.is_open and not (self._in_backward or self.in_optimizer)
        forward = forward and (current_graph_task() < 0 or self._backwards.are_running)
        recorded = not (self._unrecorded_depth or self._memory_only_depth or self._in_observer)
        if forward and recorded and self._ledger.counts(tensor) and not self._calls.escapes(tensor):
            self._escapes(tensor)

    def _escapes(self, tensor: torch.Tensor) -> None:
        self._escaped.add(self.observation.values[self._ledger.overwrite(tensor)].storage)

    def _is_escaped(self, value: int) -> bool:
        storage = self.observation.values[value].storage
        return storage in self._escaped or self._calls.is_escaped(storage)

    def begin_backward(self) -> None:
        """Mark the end of forward and the start of backward."""
        self._backwards.end()
        self._in_backward = True
        self._ledger.emit(EventKind.BACKWARD)

    def begin_optimizer(self) -> None:
        """Mark the start of the optimizer step."""
        self.in_optimizer = True
        self._ledger.free_unseen()
        self._ledger.emit(EventKind.OPTIMIZER)

    def enter_module(self, path: str, has_plain_arguments: bool) -> None:
        """Mark the start of a module call."""
        if current_graph_task() >= 0:  # made again in backward
            self.switched_off.add(CHECKPOINTING)
        self._open_paths.append(path)
        self._backwards.note_position()
        self.observation.events.append(ModuleEvent(path, has_plain_arguments))

    def exit_module(self) -> None:
        """Mark the end of the innermost module call."""
        self._open_paths.pop()
        self._backwards.note_position()
        self.observation.events.append(ModuleEvent(None))

    def take_checkpoint(self, call: CheckpointCall) -> AbstractContextManager[None] | None:
        """Return what a checkpointed function runs in, as a part of the step like any other; None if it is left alone.

        For `taking_over`.
        """
        excluded = any(is_inside(path, self._excluded) for path in self._open_paths)
        if self._foreign_hook() is not None or not self.checkpoints.takes(call, excluded=excluded):
            return None
        return self._checkpointed(call)

    @contextmanager
    def _checkpointed(self, call: CheckpointCall) -> Iterator[None]:
        self.enter_module(checkpoint_path(call.function), has_plain_arguments=False)
        try:
            with self.checkpoints.inside(call, len(self.observation.storages)):
                yield
        finally:
            self.exit_module()

    # ------------------------------------------------------------------------------------------------ for PyTorch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE and not self._memory_only_depth and (device := fake_device_of(args[0])) is not None:
            if self._ledger.is_open and not self._unrecorded_depth:
                self._sums.set_graph_task(current_graph_task())
            return device  # autograd asks this most of all
        if any_wrapper(types, args):
            return NotImplemented  # its class runs operations on its parts, which come here
        kwargs = kwargs or {}
        if self.in_optimizer and func is LOCAL_SCALAR and not self._has_data:
            return 1.0  # `item()`: an optimizer reads its step counter, and a fake tensor has no number
        if self._unrecorded_depth or not self._ledger.is_open or is_traced(self._has_data):
            return self._fakes.call(func, args, kwargs, self._fakes.known_by(func, args, kwargs))
        was_in_observer, self._in_observer = self._in_observer, True
        try:
            if self._memory_only_depth:
                return self._record_memory(func, args, kwargs)
            result = self._dispatch(func, types, args, kwargs)
            if self.known_values is not None:
                self.known_values.follow(func, args, kwargs, result)
            return result
        finally:
            self._in_observer = was_in_observer

    def _record_memory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._sums.resolve()
        result = self._fakes.call(func, args, kwargs, self._fakes.known_by(func, args, kwargs))
        if not describe(func).is_view:
            for tensor in result_tensors(result):
                if isinstance(tensor, torch.Tensor) and not is_dtensor(tensor):
                    self._ledger.value_of(tensor)
                    self._ledger.note_parts(tensor)
        return result

    def _dispatch(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph_task = current_graph_task()
        self._sums.set_graph_task(graph_task)
        info = describe(func)
        if info.is_view:
            return self._fakes.call(func, args, kwargs, self._fakes.known_by(func, args, kwargs))
        self._watch_backward(graph_task)
        if self._calls.is_in_graph:
            for tensor in mutated_tensors(info, args, kwargs):
                self._ledger.overwrite(tensor)
            return self._record_memory(func, args, kwargs)
        self._sums.resolve()
        tensors = tensors_in((*args, *kwargs.values()))
        node = self._backwards.node_of_forward(graph_task) if torch.is_grad_enabled() else -1
        forward = not self._in_backward and not self.in_optimizer and (graph_task < 0 or node >= 0)
        known_by = self._fakes.known_by(func, args, kwargs)
        signature = self._signatures.add(func, args, kwargs, known_by)
        if not forward:
            since = len(self.observation.events)
            result = self._call(func, args, kwargs, signature, known_by)
            results = [t for t in result_tensors(result) if isinstance(t, torch.Tensor)]
            self._signatures.record_result(signature, tensors, results)
            for tensor in tensors + results:
                self._ledger.value_of(tensor)
                self._ledger.note_parts(tensor)
            if not self._in_backward:  # a backward inside forward: a later replay would see what it writes in place
                for tensor in mutated_tensors(info, args, kwargs):
                    self._ledger.overwrite(tensor)
            self._ledger.emit(EventKind.OTHER_OP, signature)
            self._sums.record_op(func, args, result, since)
            return result
        self._note_hooks()
        call = ForwardCall(func, info, types, args, kwargs, tensors, signature, node)
        return self._forward_ops.record(call, lambda: self._call(func, args, kwargs, signature, known_by))

    def _call(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], signature: int, known_by: CallKey | None
    ) -> Any:
        """Run the op and give its results the real kernel's layout where the fake kernel's is known to be wrong."""
        result = self._run(func, args, kwargs, signature, known_by)
        key = self._signatures.keys[signature]
        if (layouts := self._real_layouts.get(key)) is not None:
            result = with_layouts(result, layouts, self._device.torch_device)
        if key not in self.layouts:
            self.layouts[key] = layouts_of(result, (*args, *kwargs.values()))
        return result

    def _run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], signature: int, known_by: CallKey | None
    ) -> Any:
        """Run the op, and learn what it costs where only a step with data shows that."""
        if self.known_values is not None and (number := self.known_values.scalar(func, args)) is not None:
            return number
        info, measured = describe(func), self._signatures.measured
        if not self._has_data or signature in measured or not info.is_foreign or info.blocker:
            return self._fakes.call(func, args, kwargs, known_by)
        call = self._signatures.calls[signature]
        result, measured[signature] = cost_where_it_runs(call, lambda: func(*args, **kwargs), self._device)
        return result

    def _note_hooks(self) -> None:
        """Note that somebody else's saved-tensor hooks get what the op that begins saves."""
        if (hook := self._foreign_hook()) is not None:
            self.switched_off.add(owner_of_hook(hook))
            self.under_hooks.update(self._open_paths[-1:])
            self.observation.under_hooks.add(len(self.observation.ops))

    def _foreign_hook(self) -> object:
        """Return the pack hook of whoever has saved-tensor hooks above the observer's own; None if nobody has."""
        hooks = top_saved_tensor_hooks()
        return hooks[0] if isinstance(hooks, tuple) and hooks[0] is not self._hooks.pack_hook else None

    @never_compiled
    def _call_function(self, function: Any, forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Make a call of the forward of an `autograd.Function`: an operation like others, made of operations."""
        recorded = self._ledger.is_open and not (self._unrecorded_depth or self._memory_only_depth or self._in_observer)
        in_forward = not (self._in_backward or self.in_optimizer) and current_graph_task() < 0
        recorded = recorded and in_forward and top_dispatch_mode() is self
        if not recorded or self._calls.is_open or not can_be_made_again(function, args):
            with self._hooks_aside():
                return forward(*args)
        context, inputs = arguments_of(function, args)
        with self._as_observer():
            self._sums.resolve()
            self._forward_ops.note_reads(tensors_in(inputs))
            self._calls.begin(function, inputs)
        try:
            with self._hooks_aside():
                result = forward(*args)
        except BaseException:
            self._calls.abort()
            raise
        with self._as_observer():
            self._sums.resolve()
            saved = saved_by(context)
            self._calls.end(result, saved)
            if saved:
                hold_otherwise(context, result, self._pack_stashed, self._unpack)
        return result

    @contextmanager
    def _hooks_aside(self) -> Iterator[None]:
        """As `replay.own_stacks.OwnStacks.hooks_aside`."""
        on_top = self._foreign_hook() is None and top_saved_tensor_hooks() is not None
        if on_top:
            self._hooks.__exit__()
        try:
            yield
        finally:
            if on_top:
                self._hooks.__enter__()

    def _save(self, tensor: torch.Tensor) -> Any:
        if self.checkpoints.is_open and (value := self._ledger.value_of(tensor)) >= 0:
            self.checkpoints.note_saved(self.observation.values[value].storage)
        return self._saved_tensors.pack(tensor)

    def _pack_stashed(self, tensor: torch.Tensor) -> Any:
        packed = self._save(tensor)
        return None if packed is tensor else packed

    @contextmanager
    def _as_observer(self) -> Iterator[None]:
        was_in_observer, self._in_observer = self._in_observer, True
        try:
            yield
        finally:
            self._in_observer = was_in_observer

    @never_compiled
    def _pack(self, tensor: torch.Tensor) -> Any:
        if not self._ledger.is_open or self._memory_only_depth or is_traced(self._has_data):
            return tensor
        with self._as_observer():
            self._calls.note_saved(tensor)
            if self._unseen_writes is not None and current_graph_task() < 0:
                self._unseen_writes.look_at([tensor])
            slot = len(self.observation.slots)
            packed = self._save(tensor)
            node = self._backwards.node_of_forward(current_graph_task())
            if node >= 0 and len(self.observation.slots) > slot:
                self.observation.node_of_slot[slot] = node
                if slot not in self.observation.saved_again:
                    self.observation.slots[slot] = self._backwards.from_outside(self.observation.slots[slot])
            return packed

    @never_compiled
    def _unpack(self, packed: Any) -> Any:
        leave_modes_if_asked()
        if self._ledger.is_open:
            self._watch_backward(current_graph_task())
        return self._saved_tensors.unpack(packed)

    def _watch_backward(self, graph_task: int) -> None:
        if not (self._in_backward or self.in_optimizer):
            self._backwards.watch(graph_task)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Run ops that are not the step's."""
        self._unrecorded_depth += 1
        try:
            yield
        finally:
            self._unrecorded_depth -= 1
