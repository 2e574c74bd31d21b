"""Follow one forward through a planned model, and hand what it runs and saves to the tape that is running.

A session starts with the outermost region call (or with `Applied.step`) and ends with it.  It follows the calls of
region modules (`region_calls`), gives each region its tape, and puts itself on PyTorch's stacks (`own_stacks`) only
while a region that drops something runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tightfit._torch_private.autograd import current_graph_task
from tightfit._torch_private.compiling import never_compiled
from tightfit._torch_private.dispatch import (
    MARK_BEGINS,
    MARK_ENDS,
    DispatchMode,
    ddp_begins,
    is_traced,
    no_function_modes,
    top_dispatch_mode,
)
from tightfit._torch_private.modules import ddp_runs_its_module
from tightfit.operators._checkpoint_private import taking_over
from tightfit.operators.compiled_calls import CompiledCalls
from tightfit.operators.escaped_memory import MemoryWatch
from tightfit.operators.facts import OpInfo, describe, known_facts, mutated_tensors, undeclared_writes
from tightfit.operators.function_calls import WatchedFunctions, arguments_of, can_be_made_again, saved_by
from tightfit.operators.function_transforms import WatchedTransforms
from tightfit.operators.region_names import LOSS
from tightfit.operators.stashed_tensors import hold_otherwise
from tightfit.operators.wrapper_tensors import any_wrapper
from tightfit.replay.copied_tape import handle_again
from tightfit.replay.own_stacks import OwnStacks
from tightfit.replay.plan_state import PlanState
from tightfit.replay.region_calls import RegionCalls
from tightfit.replay.replayer import unpack
from tightfit.replay.values import Kept


class Session(RegionCalls, DispatchMode):
    """One forward of one thread, from its outermost region call to that call's end."""

    def __init__(self, state: PlanState, region: Callable[[str], AbstractContextManager[object]]) -> None:
        """Follow a forward under `state`; `region` opens a call of the region at a path in this session."""
        super().__init__()
        watched = all(module.training for module in state.fast_paths)
        watch = MemoryWatch(self._expose) if watched else None
        calls = WatchedFunctions(self._call_function), WatchedTransforms(self._transform_begins)
        self._follow(state, region, OwnStacks(self, self._pack, unpack, watch, calls))
        self._writes = state.writes
        self._writes.prune()
        state.rebuilt.forget()
        self._compiled = CompiledCalls()
        self._compiled.start()
        self._taking: AbstractContextManager[None] = nullcontext()
        if not all(state.checkpoints.values()):
            self._taking = taking_over(self._take_checkpoint)
        self._taking.__enter__()

    def close(self) -> None:
        """Let go of what refers back to the session, so that it is freed without garbage collection."""
        self._compiled.stop()
        self._backwards.close()
        self._taking.__exit__(None, None, None)
        del self._taking
        if self._stacks.active:
            self._stacks.stop_watching()
        else:
            del self._stacks

    def _expose(self, tensor: torch.Tensor) -> None:
        if self._busy or self.aside:
            return
        if current_graph_task() >= 0:
            if self._backwards.is_planned():
                self._backwards.about_to_write([tensor], None)
                self._writes.expose(tensor)
            return
        if self._tape is not None:
            if self._tape.note_exposed(tensor):
                return
            self._tape.about_to_write(tensor)
        self._writes.expose(tensor)

    @never_compiled
    def _call_function(self, function: Any, forward: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Make a call of the forward of an `autograd.Function`, which the tape may have to make again as a whole."""
        tape = self._tape
        if (
            tape is None
            or tape.is_in_call
            or self._busy
            or self.aside
            or not self._stacks.active
            or current_graph_task() >= 0
            or self._is_ddps()
            or top_dispatch_mode() is not self
            or not can_be_made_again(function, args)
        ):
            with self._stacks.hooks_aside():
                return forward(*args)
        context, inputs = arguments_of(function, args)
        with self._as_own():
            tape.begin_call(function, inputs)
        try:
            with self._stacks.hooks_aside():
                result = forward(*args)
        except BaseException:
            tape.abort_call()
            raise
        with self._as_own():
            saved = saved_by(context)
            tape.end_call(result, saved)
            if saved:
                hold_otherwise(context, result, tape.pack_if_dropped, unpack)
        return result

    @contextmanager
    def _as_own(self) -> Iterator[None]:
        was_busy, self._busy = self._busy, True
        try:
            with no_function_modes():  # the watch of handed-out memory would see each attribute that is read
                yield
        finally:
            self._busy = was_busy

    @never_compiled
    def _pack(self, tensor: torch.Tensor) -> Any:
        if type(tensor) is not torch.Tensor:  # a subclass may have no other way to be what it is
            return Kept(tensor) if is_traced() else self._packed(tensor)
        with no_function_modes():
            return self._packed(tensor)

    def _packed(self, tensor: torch.Tensor) -> Any:
        was_busy, self._busy = self._busy, True
        try:
            if current_graph_task() >= 0:
                self._interrupt()
                copy = self._backwards.tape_of_node()
                again = handle_again(tensor, self._state.rebuilt, self._writes)
                if again is not None:
                    return again
                if copy is not None:
                    return copy.pack(tensor)
            tape = self._tape
            if tape is None and self._counts_saved_tensors():
                self._state.loss_saves.note(tensor)  # type: ignore[union-attr]  # asked for just before
            return Kept(tensor) if tape is None or self.aside or self._is_ddps() else tape.pack(tensor)
        finally:
            self._busy = was_busy

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if types:
            if any_wrapper(types, args):
                return NotImplemented  # its class runs operations on its parts, which come here
            if is_traced():
                return func(*args, **(kwargs or {}))
        if self.aside:
            return func(*args, **(kwargs or {}))
        info = known_facts(id(func)) or describe(func)
        tape = self._tape
        passes = (
            not info.is_view
            and info.is_quiet
            and not self._in_ddp
            and tape is not None
            and current_graph_task() < 0
            and tape.passes(func)
        )
        if info.is_view or passes:
            if func is MARK_BEGINS or func is MARK_ENDS:
                self._note_mark(func, args)
            try:
                return info.call(*args, **kwargs) if kwargs else info.call(*args)
            except BaseException:
                if passes and tape is not None:
                    tape.passed_one_that_failed()
                raise
        kwargs = kwargs or {}
        was_busy, self._busy = self._busy, True
        try:
            return self._run(func, info, types, args, kwargs)
        finally:
            self._busy = was_busy

    def _note_mark(self, func: Any, args: tuple[Any, ...]) -> None:
        if ddp_begins(func, args):
            self._in_ddp = True
        elif func is MARK_ENDS and self._is_ddps():
            self._in_ddp = False

    def _is_ddps(self) -> bool:
        """Return whether what runs now is DDP's own, and not what it wraps."""
        return self._in_ddp and not ddp_runs_its_module()

    def _run(self, func: Any, info: OpInfo, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if info.mutates or info.undeclared_writes:
            for tensor in (*mutated_tensors(info, args, kwargs), *undeclared_writes(info, args)):
                self._writes.before_write(tensor)
        in_backward = current_graph_task() >= 0
        is_planned = in_backward and self._interrupt()
        if is_planned:
            copy = self._backwards.tape_of_node() if torch.is_grad_enabled() else None  # else it makes no graph
            if info.mutates:
                self._backwards.about_to_write(mutated_tensors(info, args, kwargs), copy)
            if copy is not None:
                return copy.dispatch(func, info, types, args, kwargs)
        tape = self._tape
        if tape is None or is_traced():  # what is traced and reads no tensors
            return func(*args, **kwargs)
        if in_backward and not is_planned and self._cursor.depth == 1 and self._cursor.path == LOSS:
            # Usually the step's own backward, in `with applied.step():`. What follows it (the optimizer) is no forward;
            # should it be one after all, autograd keeps what it saves, as in the plain step.
            self._end_tape()
        # Not the region's own, but its writes count.
        if in_backward or self._is_ddps() or tape.is_in_graph or (info.may_set_up and tape.sets_up(func, info)):
            for tensor in mutated_tensors(info, args, kwargs):
                tape.about_to_write(tensor)
            return func(*args, **kwargs)
        return tape.dispatch(func, info, types, args, kwargs)
