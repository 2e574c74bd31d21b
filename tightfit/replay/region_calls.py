"""Follow the region calls of one forward: which tape is running, and when no mode is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from tightfit._torch_private.autograd import backward_keeps_graph, current_graph_node, current_graph_task
from tightfit._torch_private.modules import ddp_runs_its_module
from tightfit.device.process_state import is_capturing
from tightfit.operators._checkpoint_private import CheckpointCall
from tightfit.operators.asking_for_modes import leave_modes_in_graph
from tightfit.operators.checkpoint_calls import checkpoint_path
from tightfit.operators.region_names import LOSS, RegionCursor
from tightfit.records import SharedTape
from tightfit.replay.backwards_inside import BackwardsInside
from tightfit.replay.executors import RegionCall
from tightfit.replay.opaque_tape import OpaqueTape
from tightfit.replay.own_stacks import OwnStacks
from tightfit.replay.plan_state import Listener, PlanState
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.refusals import captured_error
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.values import AS_A_WHOLE


class RegionCalls:
    """The region calls of one forward of one thread, and the tape that its regions are recorded on."""

    def _follow(
        self, state: PlanState, region: Callable[[str], AbstractContextManager[object]], stacks: OwnStacks
    ) -> None:
        """Begin; `region` opens a call of the region at a path, `stacks` is what is on PyTorch's while one runs."""
        self.thread = threading.get_ident()
        self._state = state
        self._region = region
        self._stacks = stacks
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
        self._backwards = BackwardsInside(state)
        self.run: Callable[[RegionCall], Any] = RegionCall.run_forward
        """What makes the call of the region that runs now."""
        self._frames: list[tuple[bool, object]] = []  # of each open region: active at entry, what lay beneath

    @property
    def depth(self) -> int:
        """How many region calls are open."""
        return self._cursor.depth

    @property
    def is_over(self) -> bool:
        """Whether no region call is open."""
        return self._cursor.depth == 0

    def _transform_begins(self) -> None:
        """Leave a transform of `torch.func`, and what the running region does after it, as without a plan."""
        if self._stacks.active and not self._stacks.hooks_are_aside and not self.aside:
            self._hooks_around = self._hooks_around or self._cursor.key
            self._end_tape()
            self._stacks.switch(False)

    def tell(self, listener: Listener) -> None:
        """Tell what the forward met; at its end, as a warning may be an error, and nothing must be left half done."""
        if self._hooks_around is not None:
            listener.hooks_around(self._hooks_around)
        if self._ran_another_loss:
            listener.other_loss()
        if self._state.writes.has_noticed:
            listener.written_unseen()

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
        self._backwards.begin_region()
        key = self._cursor.key
        recipe = state.recipes.get(key)
        around_excluded = self._cursor.path in state.around_excluded
        self.run = RegionCall.run_forward
        if recipe is None and (around_excluded or key in state.recipes):  # left as it is
            self._leave_tape()
            return
        foreign, captured = self._stacks.has_foreign_hooks(), is_capturing()
        if (foreign or captured) and current_graph_task() < 0:
            drops = bool(recipe.drop) if recipe is not None else self._cursor.depth == 1
            if drops and captured:
                raise captured_error()
            if drops and self._hooks_around is None:
                self._hooks_around = key
        on_tape = not (foreign or captured or torch.compiler.is_compiling())
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
            self._leave_tape()
            return
        if self._frames[-1][1] == self._stacks.beneath():
            self._stacks.switch(True)
        if not self._stacks.active:
            self._end_tape()
            return
        self._go_on(key, recipe, was_refused=was_refused, keeps_rest=around_excluded)

    def _leave_tape(self) -> None:
        """Run on without a tape; and without modes, unless what happens has to be counted."""
        self._end_tape()
        watches = (self._counts_saved_tensors() or self._may_be_interrupted()) and not (
            self._stacks.has_foreign_hooks() or is_capturing() or torch.compiler.is_compiling()
        )
        if watches != self._stacks.active and self._frames[-1][1] == self._stacks.beneath():
            self._stacks.switch(watches)

    def _go_on(self, key: str, recipe: ResolvedRecipe | None, *, was_refused: bool, keeps_rest: bool) -> None:
        """Go on with the tape, or with another one."""
        state = self._state
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
            self._tape = OpaqueTape(state.statistics, state.writes, tree, check, repeats, state.rebuilt)
            self._tape.interrupted = self._interrupt
        state.checked.add(key)
        self._next = shared, place + 1
        self._tape.begin_region(recipe, state.refused.setdefault(key, set()), keeps_rest=keeps_rest)
        if recipe is not None:
            self._backwards.begin_region(self._tape)

    def _may_be_interrupted(self) -> bool:
        """Return whether the plan has a backward inside the running region that saves again what was dropped."""
        return self._cursor.key_if_interrupted in self._state.recipes and any(self._state.recipes.values())

    def _interrupt(self) -> bool:
        """End the running region, where the plan has a backward in it that keeps its graph, and that has just begun.

        Returns:
            Whether the backward that runs is one of the plan's.
        """
        backwards, cursor, recipes = self._backwards, self._cursor, self._state.recipes
        if backwards.is_new():
            leave_modes_in_graph(current_graph_node())
            known = cursor.key_if_interrupted in recipes and backward_keeps_graph() and self._stacks.active
            if known:
                self._end_tape()
                cursor.interrupt()
            backwards.begin(is_planned=known)
            if known and (recipe := recipes[cursor.key]) is not None:
                keeps_rest = cursor.path in self._state.around_excluded
                self._go_on(cursor.key, recipe, was_refused=False, keeps_rest=keeps_rest)
        return backwards.is_planned()

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
