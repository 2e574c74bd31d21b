"""Hold what a tape is made of: values, references to them, operations, and saved tensors that stay.

A *value* is what one storage holds between two writes.  References are counted: each handle, and each operation that is
yet to be replayed, holds one on every value that it wants; what reaches zero is freed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from tightfit._torch_private.dispatch import below_autograd
from tightfit._torch_private.tensors import (
    WeakStorage,
    alias,
    alias_outside_dispatch,
    storage_key,
    version_of,
    with_lazy_bits,
)
from tightfit.operators.facts import OpInfo
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.refusals import changed_error, modified_error
from tightfit.replay.source_mark import SourceMark
from tightfit.simulation.schedule import ScheduledOp, ScheduledValue

_Tensor = torch.Tensor


class TapedValue(ScheduledValue):
    """What one storage holds between two writes."""

    __slots__ = ("__weakref__", "address", "handles", "live", "mark", "nbytes", "output", "uninitialised", "version")

    def __init__(self, address: WeakStorage, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.op: TapedOp | None = None
        self.output = 0
        self.source: _Tensor | None = None  # held alias
        self.version: int | None = None  # the source's version when the region ended
        self.mark: SourceMark | None = None  # by which to know the contents of a source that may be written unseen
        self.memo: torch.UntypedStorage | None = None  # replayed contents
        self.refs = 0  # handles, and operations not yet replayed, that want it
        self.handles = 0  # of those, the handles
        self.last_leaf = 0  # of the tape's leaves, the last that uses it
        self.uninitialised = False
        self.live: _Tensor | None = None  # written after it was dropped: what plain autograd would read


class Ref:
    """A tensor argument or saved tensor: a value through a geometry."""

    __slots__ = ("dtype", "lazy", "offset", "size", "stride", "value")

    def __init__(self, value: TapedValue, tensor: _Tensor) -> None:
        self.value = value
        self.size = tensor.size()
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype
        self.lazy = tensor.is_conj(), tensor.is_neg()

    def of(self, value: TapedValue) -> Ref:
        """Return the same geometry of another value."""
        other = Ref.__new__(Ref)
        other.value = value
        other.size, other.stride, other.offset = self.size, self.stride, self.offset
        other.dtype, other.lazy = self.dtype, self.lazy
        return other

    def build(self, storage: torch.UntypedStorage) -> _Tensor:
        """Return a tensor of this geometry on `storage`."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        return with_lazy_bits(tensor, *self.lazy) if True in self.lazy else tensor


#: Among the positions of operations that a self-check refused: the call of the region's module, to be made again.
AS_A_WHOLE = -1


class TapedRegion:
    """One region call on a tape."""

    __slots__ = ("keeps_rest", "on_plan", "position", "recipe", "refused")

    def __init__(self, recipe: ResolvedRecipe | None, refused: set[int], keeps_rest: bool = False) -> None:
        self.recipe = recipe
        self.on_plan = recipe is not None  # its operations have been the plan's so far
        self.keeps_rest = keeps_rest  # nothing is dropped off the plan
        self.position = 0  # of its next operation, while none of its operations run
        self.refused = refused  # positions of operations that a self-check found unfit, in any call of this region

    @property
    def has_more(self) -> bool:
        """Whether more operations may come by its plan, or nobody knows."""
        return not self.on_plan or self.recipe is None or self.position < self.recipe.length

    def keeps(self, value: TapedValue) -> bool:
        """Return whether the plan has one of this region's values held."""
        return self._is_in(self.recipe.keep if self.recipe is not None else (), value)

    def drops(self, value: TapedValue) -> bool:
        """Return whether the plan has it dropped; without a plan, everything is."""
        if not self.on_plan:
            return not self.keeps_rest
        return self._is_in(self.recipe.drop if self.recipe is not None else (), value)

    def _is_in(self, names: Collection[tuple[int, int]], value: TapedValue) -> bool:
        return self.on_plan and value.op is not None and (value.op.position, value.output) in names


class TapedOp(ScheduledOp):
    """One operation that can be replayed."""

    __slots__ = (
        "args", "func", "generator", "grad", "info", "kwargs", "position", "random_state", "region", "switches",
    )  # fmt: skip

    def __init__(self, region: TapedRegion, position: int, order: int, leaf: int, func: Any, info: OpInfo) -> None:
        self.region = region
        self.position = position  # in its region
        self.order = order  # on its tape
        self.leaf = leaf  # of the tape's tree
        self.func = func
        self.info = info
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.inputs: tuple[TapedValue, ...] = ()  # each once
        self.outputs: list[TapedValue] = []
        self.demanded = False
        self.done = False
        self.grad = False
        self.switches: tuple[Any, ...] = ()  # of libraries
        self.generator: torch.Generator | None = None
        self.random_state: _Tensor | None = None


class Kept:
    """A saved tensor that stays, with the version that plain autograd would have checked."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: _Tensor) -> None:
        # An output that its own node saves has that node as grad_fn: held as it is, the two would keep each other alive
        # for ever in a graph that never sees a backward.
        # A subclass is aliased as its own kind.
        plain = type(tensor) is _Tensor or type(tensor) is torch.nn.Parameter
        self.tensor = alias_outside_dispatch(_Tensor, tensor) if plain else alias(tensor)
        self.version = version_of(tensor)

    def read(self) -> _Tensor:
        """Return the tensor; raise as plain autograd does if it was written after being saved."""
        if version_of(self.tensor) != self.version:
            raise modified_error(self.tensor.dtype, self.tensor.shape, version_of(self.tensor), self.version)
        return self.tensor


def contents(value: TapedValue) -> torch.UntypedStorage | None:
    """Return the bytes of a value, if they are at hand. Raise if its source was written after the region ended."""
    if value.memo is not None:
        return value.memo
    source = value.source
    if source is None:
        return None
    if value.version is not None and version_of(source) != value.version:
        raise changed_error(source, "in place after the region that used it ended")
    return source.untyped_storage()


def can_rebuild(wanted: TapedValue) -> bool:
    """Return whether every operation that rebuilding needs is on the tape, and every source is held."""
    seen: set[TapedValue] = set()
    stack = [wanted]
    while stack:
        value = stack.pop()
        if value in seen or value.refs:  # already demanded, hence already proved
            continue
        seen.add(value)
        if value.source is not None:
            continue
        if value.op is None or (value.op.done and value.memo is None):
            return False
        stack.extend(value.op.inputs)
    return True


def written_refs(op: TapedOp) -> dict[TapedValue, None]:
    """Return the values that the operation writes, in argument order."""
    written: dict[TapedValue, None] = {}
    for position, name in op.info.mutates:
        argument = op.args[position] if position < len(op.args) else op.kwargs.get(name)
        for ref in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(ref, Ref):
                written[ref.value] = None
    return written


def rebuild(argument: Any, storages: dict[TapedValue, torch.UntypedStorage]) -> Any:
    """Replace the references of an argument by tensors on the given storages."""
    if isinstance(argument, Ref):
        return argument.build(storages[argument.value])
    if isinstance(argument, list | tuple):
        return type(argument)(rebuild(a, storages) for a in argument)
    return argument


def copy_of_storage(tensor: _Tensor) -> _Tensor:
    """Return a tensor of the same geometry on a copy of the whole storage."""
    with below_autograd():
        storage = tensor.untyped_storage().clone()
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        return copy


#: More channels than any normalisation has.
_STATISTICS_BYTES = 64 << 10


def may_be_statistics(tensor: _Tensor) -> bool:
    """Return whether a tensor looks like running statistics, which normalisation moves with no mark and no version.

    The write is seen where the engine watches, but the normalisation may be in a region that is left untouched.
    """
    return (
        tensor.dim() == 1
        and type(tensor) is _Tensor
        and tensor.is_floating_point()
        and not tensor.requires_grad
        and tensor.untyped_storage().nbytes() <= _STATISTICS_BYTES
    )


def before_write(value: TapedValue, tensor: _Tensor) -> None:
    """Keep what is still needed of a value whose storage, which `tensor` shows, is about to be written."""
    if value.handles and value.live is None:
        # Plain autograd holds this storage: it would refuse at the read if the version moved, else see the new contents
        # (`.data`, NumPy, running statistics). So does what is held from here on.
        value.live = alias(tensor)
    source = value.source
    if source is None or storage_key(source) != storage_key(tensor):
        return
    if value.version is not None and version_of(source) != value.version:
        return  # too late: it was written where nobody looked
    if value.refs:  # somebody will need the old contents
        value.source = copy_of_storage(source)
        value.version = version_of(value.source)
    else:
        value.source = None
