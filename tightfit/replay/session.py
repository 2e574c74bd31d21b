"""Follow one forward through a planned model: which tape is running, and when no mode is needed.

A session starts with the outermost region call (or with `Applied.step`) and ends with it.  It follows the calls of
region modules, gives each region its tape, and puts itself on PyTorch's stacks (`own_stacks`) only while a region that
drops something runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from tightfit._torch_private import (
    MARK_BEGINS,
    MARK_ENDS,
    DispatchMode,
    current_graph_task,
    ddp_begins,
    ddp_runs_its_module,
    never_compiled,
    top_dispatch_mode,
)
from tightfit.device.process_state import is_capturing
from tightfit.operators._checkpoint_private import CheckpointCall, taking_over
from tightfit.operators.checkpoint_calls import checkpoint_path
from tightfit.operators.compiled_calls import CompiledCalls
from tightfit.operators.escaped_memory import MemoryWatch
from tightfit.operators.facts import OpInfo, describe, known_facts, mutated_tensors, undeclared_writes
from tightfit.operators.function_calls import WatchedFunctions, arguments_of, can_be_made_again, saved_by
from tightfit.operators.region_names import LOSS, RegionCursor
from tightfit.operators.stashed_tensors import hold_otherwise
from tightfit.records import SharedTape
from tightfit.replay.executors import RegionCall
from tightfit.replay.opaque_tape import OpaqueTape
from tightfit.replay.own_stacks import OwnStacks
from tightfit.replay.plan_state import AS_A_WHOLE, Listener, PlanState
from tightfit.replay.refusals import captured_error
from tightfit.replay.replayer import Handle
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.values import Kept


@never_compiled
def unpack(packed: Any) -> Any:
    """Return the tensor for what `Tape.pack` gave autograd."""
    if type(packed) is Handle:
        return packed.replayer.read(packed)
    if type(packed) is Kept:
        return packed.read()
    return packed


class Session(DispatchMode):
    """One forward of one thread, from its outermost region call to that call's end."""

    def __init__(self, state: PlanState, region: Callable[[str], AbstractContextManager[object]]) -> None:
        """Follow a forward under `state`; `region` opens a call of the region at a path in this session."""
        super().__init__()
        self._state = state
        self._region = region
        self._writes = state.writes
        self._writes.prune()
        self._busy = False  # inside our own code, which asks for storages, too
        self._cursor = RegionCursor()
        self._tape: OpaqueTape | None = None
        self._next: tuple[SharedTape | None, int] = (None, 0)  # the region that would go on with this tape
        self.aside = 0
        """Not 0: what runs now is not the model's."""
        self._in_ddp = False
        """Outside the model, and inside DDP's forward. Before it calls what it wraps, it sends buffers around and makes
        buckets; afterwards it may clone results. The step was measured without that, so it is no part of a tape."""
        self._hooks_around: str | None = None
        """The first region that would drop something, had nobody else's saved-tensor hooks been active."""
        self._ran_another_loss = False
        self.run: Callable[[RegionCall], Any] = RegionCall.run_forward
        """What makes the call of the region that runs now."""
        self._frames: list[tuple[bool, object]] = []  # of each open region: active at entry, what lay beneath
        watched = all(module.training for module in state.fast_paths)
        self._stacks = OwnStacks(self, self._pack, unpack, MemoryWatch(self._expose) if watched else None)
        self._functions = WatchedFunctions(self._call_function)
        self._functions.start()
        self._compiled = CompiledCalls()
        self._compiled.start()
        self._taking: AbstractContextManager[None] = nullcontext()
        if not all(state.checkpoints.values()):
            self._taking = taking_over(self._take_checkpoint)
        self._taking.__enter__()

    @property
    def depth(self) -> int:
        """How many region calls are open."""
        return self._cursor.depth

    @property
    def is_over(self) -> bool:
        """Whether no region call is open."""
        return self._cursor.depth == 0

    def close(self) -> None:
        """Let go of what refers back to the session, so that it is freed without garbage collection."""
        self._functions.stop()
        self._compiled.stop()
        del self._functions
        self._taking.__exit__(None, None, None)
        del self._taking
        if not self._stacks.active:
            del self._stacks

    def tell(self, listener: Listener) -> None:
        """Tell what the forward met; at its end, as a warning may be an error, and nothing must be left half done."""
        if self._hooks_around is not None:
            listener.hooks_around(self._hooks_around)
        if self._ran_another_loss:
            listener.other_loss()

    def enter(self, path: str, call: RegionCall | None) -> None:
        """Begin a region call; `call` as for `Installed.region`."""
        self._in_ddp = False
        self._frames.append((self._stacks.active, self._stacks.beneath()))
        self._cursor.push(path)
        try:
            self._begin(call)
        except BaseException:
            self._leave()
            raise

    def exit(self) -> None:
        """End the innermost region call (also on an exception)."""
        self._ran_another_loss |= self._runs_another_loss()
        self._leave()
        if self._cursor.depth:
            self._begin()
        else:
            self._end_tape()

    def _take_checkpoint(self, call: CheckpointCall) -> AbstractContextManager[object] | None:
        """Return what a checkpointed function of the model's runs in; None if it is left to PyTorch."""
        state, path = self._state, checkpoint_path(call.function)
        if (
            not state.takes_checkpoint(call)
            or current_graph_task() >= 0
            or self._stacks.has_foreign_hooks()
            or is_capturing()
        ):
            return None
        return self._region(path) if path in state.region_paths else nullcontext()

    def _leave(self) -> None:
        self._cursor.pop()
        self._in_ddp = self._cursor.depth == 1 and self._cursor.path == LOSS and ddp_runs_its_module()
        was_active, _ = self._frames.pop()
        self._stacks.switch(was_active)

    def _begin(self, call: RegionCall | None = None) -> None:
        state = self._state
        key = self._cursor.key
        recipe = state.recipes.get(key)
        around_excluded = self._cursor.path in state.around_excluded
        untouched = recipe is None and (around_excluded or key in state.recipes)
        foreign, captured = self._stacks.has_foreign_hooks(), is_capturing()
        if (foreign or captured) and current_graph_task() < 0:
            drops = bool(recipe.drop) if recipe is not None else self._cursor.depth == 1 and not untouched
            if drops and captured:
                raise captured_error()
            if drops and self._hooks_around is None:
                self._hooks_around = key
        elsewhere = foreign or captured or torch.compiler.is_compiling()
        self.run = RegionCall.run_forward
        on_tape = not (untouched or elsewhere)
        was_refused = False
        if recipe is not None and on_tape:
            was_refused = not recipe.executor.on_tape and AS_A_WHOLE in state.refused.get(key, ())
            if recipe.executor.on_tape:
                self.run = recipe.carry_out
            elif recipe.accepts(call) and not was_refused:
                self.run = partial(state.run_as_a_whole, recipe, key)
                on_tape = False
            else:
                recipe = None  # a tape drops as much
        if not on_tape:
            self._end_tape()
            if self._frames[-1][1] == self._stacks.beneath():
                self._stacks.switch(self._counts_saved_tensors() and not elsewhere)
            return
        if self._frames[-1][1] == self._stacks.beneath():
            self._stacks.switch(True)
        if not self._stacks.active:
            self._end_tape()
            return
        if recipe is None and not was_refused:  # a refusal is told by itself, and plans heed it
            state.statistics.unplanned_calls += 1
        shared = recipe.shared if recipe is not None else None
        place = recipe.place if recipe is not None else 0
        unchecked = state.self_check and key not in state.checked
        goes_on = self._tape is not None and shared is not None and (shared, place) == self._next
        # Under another plan the shared tape's first region may have had its self-check, and this one not.
        if self._tape is None or not goes_on or (unchecked and not self._tape.is_self_checking):
            self._end_tape()
            check = SelfCheck() if unchecked else None
            tree = shared.tree if shared is not None else None
            repeats = state.repeats if state.self_check else None
            self._tape = OpaqueTape(state.statistics, state.writes, tree, check, repeats)
        state.checked.add(key)
        self._next = shared, place + 1
        self._tape.begin_region(recipe, state.refused.setdefault(key, set()), keeps_rest=around_excluded)

    def _runs_another_loss(self) -> bool:
        tape = self._tape
        return tape is not None and self._cursor.path == LOSS and tape.left_its_plan and not self._state.loss_is_own

    def _counts_saved_tensors(self) -> bool:
        return self._state.loss_saves is not None and self._cursor.path == LOSS

    def _end_tape(self) -> None:
        if self._tape is not None:
            was_busy, self._busy = self._busy, True
            self._tape.seal()
            self._busy = was_busy
            self._tape = None

    def _expose(self, tensor: torch.Tensor) -> None:
        if self._busy or self.aside or current_graph_task() >= 0:
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
            return forward(*args)
        context, inputs = arguments_of(function, args)
        with self._as_own():
            tape.begin_call(function, inputs)
        try:
            result = forward(*args)
        except BaseException:
            tape.abort_call()
            raise
        with self._as_own():
            saved = saved_by(context)
            tape.end_call(result, saved)
            if saved:
                hold_otherwise(context, tape.pack_if_dropped, unpack)
        return result

    @contextmanager
    def _as_own(self) -> Iterator[None]:
        was_busy, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = was_busy

    @never_compiled
    def _pack(self, tensor: torch.Tensor) -> Any:
        tape = self._tape
        was_busy, self._busy = self._busy, True
        try:
            if tape is None and self._counts_saved_tensors():
                self._state.loss_saves.note(tensor)  # type: ignore[union-attr]  # asked for just before
            return Kept(tensor) if tape is None or self.aside or self._is_ddps() else tape.pack(tensor)
        finally:
            self._busy = was_busy

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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
        tape = self._tape
        if tape is None:
            return func(*args, **kwargs)
        in_backward = current_graph_task() >= 0
        if in_backward and self._cursor.depth == 1 and self._cursor.path == LOSS:
            # Usually the step's own backward, in `with applied.step():`. What follows it (the optimizer) is no forward;
            # should it be one after all, autograd keeps what it saves, as in the plain step.
            self._end_tape()
        # Not the region's own, but its writes count.
        if in_backward or self._is_ddps() or tape.is_in_graph or (info.may_set_up and tape.is_set_up_by(info)):
            for tensor in mutated_tensors(info, args, kwargs):
                tape.about_to_write(tensor)
            return func(*args, **kwargs)
        return tape.dispatch(func, info, types, args, kwargs)
