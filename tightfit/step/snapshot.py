"""Take a snapshot of everything that a step may change, and put it back bit for bit.

Everything reachable from the model, the optimizers and the batch through attributes and containers: tensors with their
gradients, versions, hooks, attributes and flags; lists, dictionaries and sets; NumPy arrays; random generators.  What
did not change is not touched, so nothing loses its identity.  Not followed: functions and their closures, module
globals, objects of the standard library and of PyTorch other than modules and optimizers, and what lies beyond the
first `_MOST_THINGS` things.
"""

from __future__ import annotations

import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from tightfit._torch_private.dispatch import no_function_modes
from tightfit._torch_private.tensors import set_versions, version_of
from tightfit.device.process_state import device_random_states, set_device_random_states
from tightfit.device.tensor_parts import holds_data
from tightfit.distributed.dtensor import is_dtensor, local_shard
from tightfit.interrupts import safe_point
from tightfit.step.host_copy import CopyFile, HostCopy, Zeros
from tightfit.step.microbatch import Microbatch
from tightfit.step.tensor_snapshot import TensorSnapshot, place_of

_MOST_THINGS = 200_000
_LARGE_ARRAY_BYTES = 2**26


class RandomState:
    """All random generators that a forward may draw from: Python, NumPy (if loaded), PyTorch on CPU and CUDA."""

    def __init__(self) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy: Any = numpy.random.get_state() if numpy is not None else None
        with no_function_modes():
            self._torch = torch.get_rng_state().numpy().tobytes()  # not a tensor: the budget counts those on a CPU
        self._devices = device_random_states()

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(torch.frombuffer(bytearray(self._torch), dtype=torch.uint8))
        set_device_random_states(self._devices)

    def equals(self, other: RandomState) -> bool:
        """Tell whether both snapshots would give the same numbers."""
        if self._python != other._python or self._torch != other._torch:
            return False
        if (self._numpy is None) != (other._numpy is None) or self._devices.keys() != other._devices.keys():
            return False
        if self._numpy is not None and not all(
            same_state(a, b) for a, b in zip(self._numpy, other._numpy, strict=True)
        ):
            return False
        return all(
            torch.equal(a, b)
            for kind, states in self._devices.items()
            for a, b in zip(states, other._devices[kind], strict=True)
        )


def same_state(a: Any, b: Any) -> bool:
    """Tell whether two parts of a generator's state are equal: numbers, or arrays of them."""
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


class TrainingState:
    """A snapshot of parameters, buffers, gradients, optimizer state, flags, plain attributes and random states.

    What is followed, and what is not, stands in the module's docstring.  Contents lie outside the device's memory
    (`host_copy`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        also: Iterable[Any] = (),
        *,
        contents: bool = True,
        known: TrainingState | None = None,
        zeros: Iterable[torch.Tensor] = (),
    ) -> None:
        """Take the snapshot.

        Args:
            model: with all that it holds.
            optimizers: with their state.
            also: further things that a step may change, such as its batch.
            contents: copy what tensors hold; else `restore` raises if that changed.
            known: an earlier snapshot whose contents were just put back; what it has is not copied again. (Versions
                alone would not do: operations on a `DTensor` leave its shard's as it is.)
            zeros: tensors that hold zeros, which need no copy.
        """
        self._file = CopyFile() if contents else None
        self._known = known
        self._zeros = {id(tensor) for tensor in zeros}
        self._tensors: list[TensorSnapshot] = []
        self._containers: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._slots: list[tuple[Any, dict[Any, Any]]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {}
        self._walk([model, *optimizers, *also])
        self._seen = {}
        self._known = None
        self._random = RandomState()

    def restore(self) -> None:
        """Put everything back; tensors keep their identity and storage.

        Raises:
            UnsupportedInput: a tensor changed whose contents were not saved.
        """
        for container, contents in self._containers:
            _restore_container(container, contents)
        for kind, attributes in self._classes:
            _restore_class(kind, attributes)
        for thing, slots in self._slots:
            _restore_slots(thing, slots)
        for saved in self._tensors:
            saved.restore()
        self._restore_versions()
        for array, contents in self._arrays:
            array[...] = contents
        for generator, state in self._generators:
            _set_generator_state(generator, state)
        self._random.restore()

    @cached_property
    def _saved(self) -> dict[object, TensorSnapshot]:
        """The tensors, by their number (`id`), and by the memory that they show.

        FSDP2 shows its shards through new tensors from the first step on.
        """
        strided = [saved for saved in self._tensors if saved.shown.layout is torch.strided and not saved.is_distributed]
        places: dict[object, TensorSnapshot] = {place_of(saved.shown): saved for saved in strided}
        return places | {id(saved.tensor): saved for saved in self._tensors}

    def restore_contents(self) -> None:
        """Put back what the tensors held, and leave all else as it is now: tensors that came to be, for example."""
        for saved in self._tensors:
            saved.restore_contents()
        self._restore_versions()

    def _restore_versions(self) -> None:
        pairs = [(saved.tensor, saved.version) for saved in self._tensors if saved.version >= 0]
        set_versions([tensor for tensor, _ in pairs], [version for _, version in pairs])

    def _walk(self, roots: list[Any]) -> None:
        pending = deque(roots)
        while pending and len(self._seen) < _MOST_THINGS:
            safe_point()
            thing = pending.popleft()
            if isinstance(thing, _ATOMS) or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            pending.extend(self._note(thing))

    def _note(self, thing: Any) -> Iterator[Any]:
        """Save one thing; yield what it leads to."""
        if isinstance(thing, torch.Tensor):
            saved = TensorSnapshot(thing, self._contents_of(thing))
            self._tensors.append(saved)
            part_here = local_shard(thing) if saved.is_distributed else None
            for part in (saved.gradient, saved.attributes, part_here, *saved.hooks.values()):
                if part is not None:
                    yield part
        elif isinstance(thing, dict):
            self._containers.append((thing, list(thing.items())))
            yield from thing.values()
            yield from (key for key in thing if isinstance(key, torch.Tensor))
        elif isinstance(thing, list | deque):
            self._containers.append((thing, list(thing)))
            yield from thing
        elif isinstance(thing, set):
            self._containers.append((thing, set(thing)))
            yield from thing
        elif isinstance(thing, tuple | frozenset):
            yield from thing
        elif isinstance(thing, Microbatch):
            yield thing.batch
        elif (state := generator_state(thing)) is not None:
            self._generators.append((thing, state))
        elif is_array(thing):
            if thing.nbytes <= _LARGE_ARRAY_BYTES and thing.flags.writeable:
                self._arrays.append((thing, thing.copy()))
        elif _has_attributes(thing):
            if isinstance(getattr(thing, "__dict__", None), dict):
                yield vars(thing)
            if isinstance(thing, torch.nn.Module):
                yield from self._note_classes(type(thing))
            if slots := _slots_of(thing):
                self._slots.append((thing, slots))
                yield from slots.values()

    def _contents_of(self, tensor: torch.Tensor) -> HostCopy | Zeros | None:
        # What a sharded tensor holds is in its local part, and one on `meta` holds nothing.
        if self._file is None or is_dtensor(tensor) or not holds_data(tensor):
            return None
        if id(tensor) in self._zeros:
            return Zeros()
        earlier = self._known._saved if self._known is not None else {}
        known = earlier.get(id(tensor))
        if known is None and earlier and tensor.layout is torch.strided:
            known = earlier.get(place_of(tensor))
        if known is not None and known.is_unchanged() and version_of(tensor) == known.version:
            return known.contents
        return HostCopy(tensor, self._file)

    def _note_classes(self, kind: type) -> Iterator[Any]:
        """Save what a module's classes hold themselves, such as a counter; yield what it leads to."""
        for one in kind.__mro__:
            if id(one) not in self._seen and is_users(one):
                self._seen[id(one)] = one
                attributes = _own_class_attributes(one)
                self._classes.append((one, attributes))
                yield from attributes.values()


#: Hold nothing that a step could change.
_ATOMS = (
    int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType,
)  # fmt: skip


#: What a class may hold of a step's state; functions, properties and other classes are what it is.
_KEPT_IN_CLASSES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    list,
    dict,
    set,
    tuple,
    deque,
    Counter,
    defaultdict,
)


def _restore_container(container: Any, contents: Any) -> None:
    """Make a container hold what it held, if it does not."""
    if isinstance(container, dict):
        if "_modules" in container:
            contents = _with_forward_of(container, contents)
        now = list(container.items())
        if len(now) == len(contents) and all(a is c and b is d for (a, b), (c, d) in zip(now, contents, strict=True)):
            return
        # The base class's own methods: a subclass may do more in its own.
        kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        kind.clear(container)
        for key, value in contents:
            kind.__setitem__(container, key, value)
    elif isinstance(container, set):
        if container != contents:
            container.clear()
            container.update(contents)
    elif len(container) != len(contents) or not all(a is b for a, b in zip(container, contents, strict=True)):
        container.clear()
        container.extend(contents)


def _with_forward_of(module: dict[str, Any], contents: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return what a module held, with the forward that it has now: an installed plan is not the step's doing."""
    if "forward" not in module:
        return [pair for pair in contents if pair[0] != "forward"]
    forward = "forward", module["forward"]
    if all(key != "forward" for key, _ in contents):
        return [*contents, forward]
    return [forward if pair[0] == "forward" else pair for pair in contents]


def generator_state(thing: Any) -> Any:
    """Return the state of a random generator; None for anything else."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, random.Random):
        return thing.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(thing, numpy.random.Generator):
        return thing.bit_generator.state
    if numpy is not None and isinstance(thing, numpy.random.RandomState):
        return thing.get_state()
    return None


def _set_generator_state(thing: Any, state: Any) -> None:
    if isinstance(thing, random.Random):
        thing.setstate(state)
    elif hasattr(thing, "bit_generator"):
        thing.bit_generator.state = state
    else:
        thing.set_state(state)


def is_array(thing: Any) -> bool:
    """Tell whether a thing is a NumPy array of numbers."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, numpy.ndarray) and thing.dtype != object


def _has_attributes(thing: Any) -> bool:
    """Tell whether an object's attributes are part of the model's or the optimizer's state."""
    if isinstance(thing, torch.nn.Module | torch.optim.Optimizer | types.SimpleNamespace):
        return True
    return is_users(type(thing))


def is_users(thing: Any) -> bool:
    """Tell whether a class, function or module is not PyTorch's, NumPy's, this package's, or the standard library's."""
    home = str(getattr(thing, "__module__", None) or getattr(thing, "__name__", "")).partition(".")[0]
    return home == "__main__" or (home not in ("torch", "tightfit", "numpy") and home not in sys.stdlib_module_names)


def attributes_of(thing: Any) -> dict[str, Any]:
    """Return the attributes of an object of the user's classes, in its dictionary and slots; none of any other's."""
    if not _has_attributes(thing):
        return {}
    slots = {slot.__name__: value for slot, value in _slots_of(thing).items()}
    own = getattr(thing, "__dict__", None)
    return slots | (own if isinstance(own, dict) else {})


def class_attributes_of(kind: type) -> dict[str, Any]:
    """Return the values and containers that a user's class and those above it hold themselves."""
    found: dict[str, Any] = {}
    for one in reversed(kind.__mro__):
        if is_users(one):
            found |= _own_class_attributes(one)
    return found


def _own_class_attributes(kind: type) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(kind).items()
        if type(value) in _KEPT_IN_CLASSES and not name.startswith(("__", "_abc_"))
    }


def _restore_class(kind: type, attributes: dict[str, Any]) -> None:
    now = _own_class_attributes(kind)
    for name in now.keys() - attributes.keys():
        type.__delattr__(kind, name)
    for name, value in attributes.items():
        if now.get(name, kind) is not value:
            type.__setattr__(kind, name, value)


def _slots_of(thing: Any) -> dict[Any, Any]:
    """Return what an object holds in slots, by their descriptors."""
    found = {}
    for kind in type(thing).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, types.MemberDescriptorType):
                with suppress(AttributeError):  # an empty slot
                    found[slot] = slot.__get__(thing)
    return found


def _restore_slots(thing: Any, slots: dict[Any, Any]) -> None:
    for slot, now in _slots_of(thing).items():
        if slot not in slots:
            slot.__delete__(thing)
        elif now is not slots[slot]:
            slot.__set__(thing, slots[slot])
