"""Record a region, or several that follow each other, on a tape, so that parts of it can be replayed.

Every operation that the plan needs for replay is written down with its arguments as *values seen through a geometry*:
a value is what one storage holds between two writes, so views cost nothing and an in-place operation makes a new value.
A value is a *source* if the tape holds it (made outside the region, kept by the plan, or not replayable), else it is
rebuilt.  When autograd saves a value that the plan drops, it gets a `Handle` instead, and every operation that
rebuilding needs gets one reference on each of its inputs.

Invariants
----------
* The live tape decides what is safe; the plan is only a hint about what is worth dropping.
* A source written after it was recorded is noticed: inside this region or a later one because the write is seen (the
  old contents are copied first if something needs them), elsewhere by its version counter (then replay refuses).
* A dropped tensor that is written afterwards is read as plain autograd reads it: refused if its version moved, else
  with the new contents.
* Blind spots: a write that neither goes through the dispatcher, nor moves a version counter, nor comes from memory that
  was seen to be handed out (`tightfit.operators.escaped_memory`).  The self-check, at the first call of each region,
  compares checksums to find such writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tightfit._torch_private.libraries import library_switches
from tightfit._torch_private.tensors import WeakStorage, storage_key
from tightfit.device.placement import device_of_call, generators_of
from tightfit.operators import replayable as safety
from tightfit.operators.facts import OpInfo, draws, mutated_tensors, setting_up, tensors_in, undeclared_writes
from tightfit.operators.opaque_calls import OpaqueCall, OperatorCall, function_of
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.replay.current_values import CurrentValues
from tightfit.replay.rebuilt import Rebuilt
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.repeats import Repeats
from tightfit.replay.self_check import SelfCheck
from tightfit.replay.statistics import Statistics
from tightfit.replay.values import TapedOp, TapedRegion, TapedValue
from tightfit.replay.write_watch import WriteWatch

_Tensor = torch.Tensor
#: More operations than a tape has.
_MOST_OPS = 2**32
_Noted = (torch.Tensor, list, tuple)


class Tape(CurrentValues):
    """Records one region call, or several that follow each other, and replays parts of it.

    Forward is one thread's; replay may be any thread's.
    """

    def __init__(
        self,
        statistics: Statistics,
        writes: WriteWatch,
        tree: RecomputeTree | None = None,
        check: SelfCheck | None = None,
        repeats: Repeats | None = None,
        rebuilt: Rebuilt | None = None,
    ) -> None:
        super().__init__(statistics, writes, tree, check, rebuilt if rebuilt is not None else Rebuilt())
        self._repeats = repeats
        self._place = 0  # of the region among the tape's
        self._position = 0  # of the next operation in it
        self._first_order = 0  # of its operations
        self._copies = 0
        self._switches: tuple[Any, ...] = ()  # of libraries, as the last operation found them

    @property
    def is_self_checking(self) -> bool:
        """Whether its operations are checked as they run."""
        return self.check is not None

    @property
    def left_its_plan(self) -> bool:
        """Whether the running region has a plan and ran other operations."""
        region = self._region
        return region is not None and region.recipe is not None and not region.on_plan

    def begin_region(self, recipe: ResolvedRecipe | None, refused: set[int], *, keeps_rest: bool = False) -> None:
        """Begin a region call that follows a recipe (None: what is provably replayable is dropped).

        `keeps_rest`: once its operations are not the recipe's, everything is kept.
        """
        self._end_region()
        self._region = TapedRegion(recipe, refused, keeps_rest)
        self._switches = library_switches()
        self._place = recipe.place if recipe is not None else 0
        self._go_to(0)

    @property
    def region(self) -> TapedRegion | None:
        """The region that it records."""
        return self._region

    @property
    def root(self) -> Tape:
        """The tape of which this is a copy: itself."""
        return self

    def original(self, one: Any) -> Any:
        """Return the value or operation that one of this tape is a copy of: itself."""
        return one

    def further_order(self) -> int:
        """Return a number from which on no operation of the tape or of its copies is numbered yet."""
        self._copies += 1
        return self._copies * _MOST_OPS

    def _end_region(self) -> None:
        if self._region is not None:
            self._region.position = self._position

    def _go_to(self, position: int) -> None:
        self._position = position
        if self.tree is not None:
            self._leaf = self.tree.leaf_at(self._place, position)

    def passes(self, func: Any) -> bool:
        """Return whether the plan has no use for the operation that comes now; if so, the tape is past it.

        For operations that change nothing the tape knows (`OpInfo.is_quiet`).  What it makes is unknown to the tape and
        external when it is seen again, as with any operation that is not written down.  Its results cannot be taken for
        a value of the tape: every such value reserves the address of its storage.
        """
        region = self._region
        if self.tree is not None or self.check is not None or region is None or not region.on_plan:
            return False
        recipe = region.recipe
        if recipe is None or recipe.passes[self._position] is not func:
            return False
        self._position += 1
        return True

    def sets_up(self, func: Any, info: OpInfo) -> bool:
        """Return whether an operation, which is not the plan's next, is done once for one that the plan has further on.

        Then it is no part of the step.  Under autocast the weights are laid out anew in between.
        """
        recipe = self._region.recipe if self._region is not None and self._region.on_plan else None
        if recipe is None or self._position >= recipe.length or recipe.funcs[self._position] is func:
            return False
        return any(info.name in setting_up(further) for further in recipe.funcs[self._position :])

    def passed_one_that_failed(self) -> None:
        """Take back the last `passes`: measuring does not count an operation that fails, either."""
        self._position -= 1

    def dispatch(
        self, func: Any, info: OpInfo, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one (non-view) operation of the region and note what it does."""
        position = self._position
        region = self._region
        assert region is not None
        held_count = len(self._held)
        record, left_with = self._follow_plan(region, func)
        if position in region.refused:
            record = False
        op = self._record(region, func, info, types, args, kwargs) if record else None
        check = self.check
        if check is not None and op is not None:
            check.note_reads(op)
        repeat = None
        if op is not None and info.may_differ and self._repeats is not None:
            repeat = self._repeats.begin(op, args, kwargs)
        mutated = mutated_tensors(info, args, kwargs) if info.mutates else []
        for tensor in mutated:
            self.about_to_write(tensor)
        if info.undeclared_writes:
            for tensor in undeclared_writes(info, args):
                self.about_to_write(tensor)
        watched = check.look_at(info, args) if check is not None and op is None and info.is_foreign else []
        try:
            result = func(*args, **kwargs)
        except BaseException:
            self._forget_failed(region, op, held_count, left_with)
            raise
        if check is not None and watched:
            self._written_unseen(func, check.changed_since(watched))
        if info.splits_silently:
            self._split[storage_key(args[0])] = WeakStorage(args[0])
        self._register(op, info, mutated, result)
        if op is not None and isinstance(op.func, OpaqueCall):
            op.func.done()
        if op is not None and repeat is not None and not repeat.agrees(result):
            if info.is_foreign:
                written = {id(tensor) for tensor in repeat.changed_inputs()}
                places = [(n, t) for n, a in enumerate(args) for t in tensors_in((a,)) if id(t) in written]
                self._written_unseen(func, places)
            repeat.refuse(region, position)
            self.statistics.refused_ops += 1
            self._current = {key: value for key, value in self._current.items() if value.op is not op}
        self._go_to(position + 1)
        return result

    def _follow_plan(
        self, region: TapedRegion, func: Any
    ) -> tuple[bool, list[tuple[TapedValue, _Tensor | None]] | None]:
        """Return whether the operation that comes now may have to be replayed; leave the plan if it has another there,
        and return then what may be running statistics.
        """
        recipe = region.recipe
        if not region.on_plan or recipe is None:
            return True, None
        position = self._position
        if position < recipe.length and recipe.funcs[position] is func:
            return recipe.record[position], None
        region.on_plan = False
        self.statistics.mismatches += 1
        left_with = [(value, value.source) for value in self._movable]
        self._copy_movable()
        return True, left_with

    def _forget_failed(
        self,
        region: TapedRegion,
        op: TapedOp | None,
        held_count: int,
        left_with: list[tuple[TapedValue, _Tensor | None]] | None,
    ) -> None:
        """Go on as if the operation had not been tried: a step that catches the error goes on by its plan.

        `held_count`: sources held before it. `left_with`: what may be running statistics, if it was not the plan's.
        """
        if op is not None:
            self._ops.pop()
            self.statistics.taped_ops -= 1
            for value in self._held[held_count:]:
                value.source = None
            self._movable = [value for value in self._movable if value.source is not None]
            del self._held[held_count:]
        if left_with is not None:
            region.on_plan = True
            self.statistics.mismatches -= 1
            for value, source in left_with:
                value.source = source
                self._movable.append(value)

    def _record(
        self,
        region: TapedRegion,
        func: Any,
        info: OpInfo,
        types: Sequence[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> TapedOp | None:
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs.values())
        device = device_of_call(tensors, kwargs)
        if safety.blocker(info, types, args, kwargs, tensors, device, function_of(func)):
            return None
        exposed = self._writes.exposed
        if exposed and any(storage_key(tensor) in exposed for tensor in tensors):
            return None
        if info.is_foreign and not isinstance(func, OpaqueCall):
            func = OperatorCall(func, device, generators_of(tensors))
        op = TapedOp(region, self._position, self._first_order + len(self._ops), self._leaf, func, info)
        op.grad = torch.is_grad_enabled()
        if info.uses_libraries:
            now = library_switches()
            if now != self._switches:
                self._switches = now
        op.switches = self._switches
        if info.is_random and draws(info, args, kwargs):
            op.generator = safety.call_generator(args, kwargs, device)
            if op.generator is None:
                return None
            op.random_state = op.generator.get_state()
        if info.undeclared_writes and info.training_flag >= 0 and args[info.training_flag]:
            # Running statistics are updated in forward, once: replay gets None in their place.
            args = tuple(None if place in info.undeclared_writes else a for place, a in enumerate(args))
        inputs: dict[TapedValue, None] = {}
        for tensor in tensors:
            value = self._current.get(storage_key(tensor))
            if value is not None and value.uninitialised:
                whole = tensor is args[0] and tensor.numel() * tensor.itemsize == value.nbytes
                if not (info.is_full_writer and whole):
                    return None
        op.args = tuple([self._note(a, inputs) if isinstance(a, _Noted) else a for a in args])
        if kwargs:
            op.kwargs = {name: self._note(a, inputs) if isinstance(a, _Noted) else a for name, a in kwargs.items()}
        op.inputs = tuple(inputs)
        self._ops.append(op)
        self.statistics.taped_ops += 1
        return op

    def seal(self) -> None:
        """End the tape's last region: let go of everything that no handle needs."""
        with self.lock:
            self._end_region()
            super().seal()
