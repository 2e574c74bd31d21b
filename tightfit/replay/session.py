"""Follow one forward through a planned model: which tape is running, and when no mode is needed.

A session starts with the outermost region call (or with `Applied.step`) and ends with it.  It follows the calls of
region modules, gives each region its tape, and puts the dispatch mode and the saved-tensor hooks on PyTorch's stacks
only while a region that drops something runs.

PyTorch's stacks are last in, first out, and user code may push modes or hooks of its own between two of our calls.
`_switch` therefore changes them only if whatever lies beneath ours is what lay there when the calling region began;
otherwise it leaves them and lets operations pass through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from tightfit._torch_private import (
    MARK_BEGINS,
    MARK_ENDS,
    DispatchMode,
    current_graph_task,
    ddp_begins,
    ddp_runs_its_module,
    dispatch_depth,
    function_mode_depth,
    never_compiled,
    saved_tensor_hooks_allowed,
    top_dispatch_mode,
    top_function_mode,
    top_saved_tensor_hooks,
)
from tightfit.device.process_state import is_capturing
from tightfit.errors import UnsupportedInput
from tightfit.operators._checkpoint_private import CheckpointCall, taking_over
from tightfit.operators.checkpoint_calls import checkpoint_path, reason_to_leave
from tightfit.operators.compiled_calls import CompiledCalls
from tightfit.operators.escaped_memory import MemoryWatch
from tightfit.operators.facts import OpInfo, describe, known_facts, mutated_tensors, undeclared_writes
from tightfit.operators.function_calls import WatchedFunctions, arguments_of, can_be_made_again, saved_by
from tightfit.operators.region_names import LOSS, RegionCursor, is_module_below
from tightfit.operators.stashed_tensors import hold_otherwise
from tightfit.records import SharedTape
from tightfit.replay.executors import RegionCall
from tightfit.replay.executors.module_state import NO_MOVES, Moves
from tightfit.replay.opaque_tape import OpaqueTape
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.refusals import captured_error
from tightfit.replay.repeats import Repeats
from tightfit.replay.replayer import Handle
from tightfit.replay.saved_bytes import SavedBytes
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.statistics import Statistics
from tightfit.replay.values import Kept
from tightfit.replay.write_watch import WriteWatch

#: Among the positions of operations that a self-check refused: the call of the region's module, to be made again.
AS_A_WHOLE = -1


def as_a_whole(key: str) -> str:
    """Return what `Installed.checked` holds where the call of the region's module has been judged."""
    return f"{key} as a whole"


class Listener(Protocol):
    """Hears where a forward leaves what its plan promises."""

    def hooks_around(self, key: str) -> None:
        """Hear that saved-tensor hooks of others are active around a region in which something would be dropped."""

    def region_alone(self, path: str) -> None:
        """Hear that a region was called with neither the model nor a step open around it."""

    def other_loss(self) -> None:
        """Hear that what ran as the loss is not what was planned."""


@dataclass(kw_only=True)
class Installed:
    """What all sessions of one applied plan share."""

    recipes: Mapping[str, ResolvedRecipe | None]
    """By region key; None leaves the region untouched. A key that is missing has no decision: all that is provably
    replayable is dropped."""
    around_excluded: frozenset[str] = frozenset()
    """Paths of the regions that run excluded modules among their own operations: what no plan decides about is kept."""
    kept_whole: frozenset[str] = frozenset()
    """Paths of the regions that run as plain PyTorch, whatever a plan says or does not say of one of their calls."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """The model's own checkpointed functions, as `Plan.checkpoints`; what is not in it is left alone."""
    region_paths: frozenset[str] = frozenset()
    """Paths of all regions."""
    enabled: bool = True
    """Off: regions run as plain PyTorch."""
    self_check: bool = True
    """Whether each region's replay is checked at its first call."""
    statistics: Statistics = field(default_factory=Statistics)
    refused: dict[str, set[int]] = field(default_factory=dict)
    """Positions, by region key, of operations that a self-check refused."""
    checked: set[str] = field(default_factory=set)
    """Keys of regions whose self-check is done, and `as_a_whole` of those whose module is known to bear a second call
    or not."""
    moves: dict[str, tuple[tuple[type, ...], Moves]] = field(default_factory=dict)
    """What a call moves that is made again, by region key, and the classes of the modules of which that is known."""
    repeats: Repeats = field(default_factory=Repeats)
    """Which calls gave the same bits twice."""
    writes: WriteWatch = field(default_factory=WriteWatch)
    fast_paths: Sequence[torch.nn.Module] = ()
    """See `with_fast_paths`: while one of them is in eval mode, handed-out memory is not watched."""
    sessions: dict[int, Session] = field(default_factory=dict)
    """Open sessions by thread."""
    listener: Listener | None = None
    loss_saves: SavedBytes | None = None
    """Counts what an untouched loss saves, in a step in which that is asked for."""
    loss_is_own: bool = False
    """The loss that runs now is the planned one, whichever operations it runs."""

    @contextmanager
    def region(self, path: str, call: RegionCall | None = None) -> Iterator[Callable[[RegionCall], Any]]:
        """Open a call of the region module at `path`, in the thread's session (opened if need be).

        Inside, what is to make the call. `call` is None where the region is no module's call (the loss).
        """
        thread = threading.get_ident()
        session = self.sessions.get(thread)
        if session is None:
            if self.sessions and current_graph_task() < 0:
                raise UnsupportedInput(
                    "two threads run forward of one planned model at the same time. The plan's memory prediction and "
                    "its bookkeeping are for one forward at a time. Use one process per device (torchrun), give each "
                    "thread its own copy of the model, or call remove() first; nn.DataParallel is not supported."
                )
            if self.listener is not None and is_module_below(path) and current_graph_task() < 0:
                self.listener.region_alone(path)
            session = self.sessions[thread] = Session(self)
        depth = session.depth
        try:
            session.enter(path, call)
            try:
                yield session.run
            finally:
                while session.depth > depth:  # before PyTorch 2.13, a checkpointed function that fails is not ended
                    session.exit()
        finally:
            if session.is_over:
                self.sessions.pop(thread, None)
                session.close()
        if session.is_over and self.listener is not None:
            session.tell(self.listener)

    def takes_checkpoint(self, call: CheckpointCall) -> bool:
        """Return whether a checkpointed function of the model's runs as any other code."""
        reason = self.checkpoints.get(checkpoint_path(call.function), "it was not seen when the step was measured")
        return not (reason or reason_to_leave(call))

    def taking_checkpoints(self) -> AbstractContextManager[None]:
        """Return a context in which checkpointed functions are no more than functions, in forward and in backward."""
        return taking_over(lambda call: nullcontext() if self.takes_checkpoint(call) else None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the ops that this thread runs inside untaped: FSDP2's all-gathers and gradient reductions."""
        session = self.sessions.get(threading.get_ident())
        if session is None:
            yield
            return
        session.aside += 1
        try:
            yield
        finally:
            session.aside -= 1


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

    def __init__(self, installed: Installed) -> None:
        super().__init__()
        self._installed = installed
        self._writes = installed.writes
        self._writes.prune()
        self._busy = False  # inside our own code, which asks for storages, too
        self._watch: MemoryWatch | None = None
        if all(module.training for module in installed.fast_paths):
            self._watch = MemoryWatch(self._expose)
        self._cursor = RegionCursor()
        self._tape: OpaqueTape | None = None
        self._next: tuple[SharedTape | None, int] = (None, 0)  # the region that would go on with this tape
        self._active = False
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
        self._pack_hook: Callable[[torch.Tensor], Any] = self._pack
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack_hook, unpack)
        self._functions = WatchedFunctions(self._call_function)
        self._functions.start()
        self._compiled = CompiledCalls()
        self._compiled.start()
        self._taking: AbstractContextManager[None] = nullcontext()
        if not all(installed.checkpoints.values()):
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
        if not self._active:
            del self._watch, self._hooks, self._pack_hook

    def tell(self, listener: Listener) -> None:
        """Tell what the forward met; at its end, as a warning may be an error, and nothing must be left half done."""
        if self._hooks_around is not None:
            listener.hooks_around(self._hooks_around)
        if self._ran_another_loss:
            listener.other_loss()

    def enter(self, path: str, call: RegionCall | None) -> None:
        """Begin a region call; `call` as for `Installed.region`."""
        self._in_ddp = False
        self._frames.append((self._active, self._beneath()))
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
        installed, path = self._installed, checkpoint_path(call.function)
        if (
            not installed.takes_checkpoint(call)
            or current_graph_task() >= 0
            or self._has_foreign_hooks()
            or is_capturing()
        ):
            return None
        return installed.region(path) if path in installed.region_paths else nullcontext()

    def _leave(self) -> None:
        self._cursor.pop()
        self._in_ddp = self._cursor.depth == 1 and self._cursor.path == LOSS and ddp_runs_its_module()
        was_active, _ = self._frames.pop()
        self._switch(was_active)

    def _begin(self, call: RegionCall | None = None) -> None:
        installed = self._installed
        key = self._cursor.key
        recipe = installed.recipes.get(key)
        around_excluded = self._cursor.path in installed.around_excluded
        untouched = recipe is None and (around_excluded or key in installed.recipes)
        untouched = untouched or self._cursor.path in installed.kept_whole
        foreign, captured = self._has_foreign_hooks(), is_capturing()
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
            was_refused = not recipe.executor.on_tape and AS_A_WHOLE in installed.refused.get(key, ())
            if recipe.executor.on_tape:
                self.run = recipe.carry_out
            elif recipe.accepts(call) and not was_refused:
                self.run = partial(self._run_as_a_whole, recipe, key)
                on_tape = False
            else:
                recipe = None  # a tape drops as much
        if not on_tape:
            self._end_tape()
            if self._frames[-1][1] == self._beneath():
                self._switch(self._counts_saved_tensors() and not elsewhere)
            return
        if self._frames[-1][1] == self._beneath():
            self._switch(True)
        if not self._active:
            self._end_tape()
            return
        if recipe is None and not was_refused:  # a refusal is told by itself, and plans heed it
            installed.statistics.unplanned_calls += 1
        shared = recipe.shared if recipe is not None else None
        place = recipe.place if recipe is not None else 0
        unchecked = installed.self_check and key not in installed.checked
        goes_on = self._tape is not None and shared is not None and (shared, place) == self._next
        # Under another plan the shared tape's first region may have had its self-check, and this one not.
        if self._tape is None or not goes_on or (unchecked and not self._tape.is_self_checking):
            self._end_tape()
            check = SelfCheck() if unchecked else None
            tree = shared.tree if shared is not None else None
            repeats = installed.repeats if installed.self_check else None
            self._tape = OpaqueTape(installed.statistics, installed.writes, tree, check, repeats)
        installed.checked.add(key)
        self._next = shared, place + 1
        self._tape.begin_region(recipe, installed.refused.setdefault(key, set()), keeps_rest=around_excluded)

    def _run_as_a_whole(self, recipe: ResolvedRecipe, key: str, call: RegionCall) -> Any:
        """Make a call that may be made again in backward; the first time, only if it bears that."""
        installed = self._installed
        if not all(installed.checkpoints.values()):
            call.inside = installed.taking_checkpoints
        kinds = tuple(map(type, call.module.modules()))
        known, moves = installed.moves.get(key, ((), NO_MOVES))
        if installed.self_check and known != kinds:
            installed.checked.add(as_a_whole(key))
            found = recipe.find_moves(call)
            if found is None:
                installed.refused.setdefault(key, set()).add(AS_A_WHOLE)
                installed.statistics.refused_ops += 1
                return call.run_forward()
            moves = found
            installed.moves[key] = kinds, moves
        call.moves = moves
        return recipe.carry_out(call)

    def _runs_another_loss(self) -> bool:
        tape = self._tape
        return tape is not None and self._cursor.path == LOSS and tape.left_its_plan and not self._installed.loss_is_own

    def _counts_saved_tensors(self) -> bool:
        return self._installed.loss_saves is not None and self._cursor.path == LOSS

    def _has_foreign_hooks(self) -> bool:
        """Return whether somebody else's saved-tensor hooks are active, or such hooks forbidden (`torch.func.grad`).

        `torch.utils.checkpoint` counts what is saved under its hooks, in forward and again when it recomputes: a region
        that took some of it away in one of the two would make it confuse tensors.  Measuring sees nothing saved
        there, either, so a plan drops nothing.
        """
        hooks = top_saved_tensor_hooks()
        ours = isinstance(hooks, tuple) and hooks[0] is self._pack_hook
        return not saved_tensor_hooks_allowed() or (hooks is not None and not ours)

    def _end_tape(self) -> None:
        if self._tape is not None:
            was_busy, self._busy = self._busy, True
            self._tape.seal()
            self._busy = was_busy
            self._tape = None

    def _beneath(self) -> object:
        """Return what lies on PyTorch's stacks beneath our own mode and hooks; None if ours are not on top."""
        if not self._active:
            return dispatch_depth(), top_saved_tensor_hooks(), function_mode_depth()
        if not self._on_top():
            return None
        self._pop()
        below = dispatch_depth(), top_saved_tensor_hooks(), function_mode_depth()
        self._push()
        return below

    def _on_top(self) -> bool:
        hooks = top_saved_tensor_hooks()
        return (
            top_dispatch_mode() is self
            and isinstance(hooks, tuple)
            and hooks[0] is self._pack_hook
            and (self._watch is None or top_function_mode() is self._watch)
        )

    def _switch(self, active: bool) -> None:
        if active == self._active:
            return
        if active:
            self._push()
        elif self._on_top():
            self._pop()

    def _push(self) -> None:
        self._hooks.__enter__()
        self.activate()
        if self._watch is not None:
            self._watch.activate()
        self._active = True

    def _pop(self) -> None:
        if self._watch is not None:
            self._watch.deactivate()
        self.deactivate()
        self._hooks.__exit__(None, None, None)
        self._active = False

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
            or not self._active
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
                self._installed.loss_saves.note(tensor)  # type: ignore[union-attr]  # asked for just before
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
