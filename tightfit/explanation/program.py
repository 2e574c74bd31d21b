"""A script's step as calls that can be made again: of its outermost modules, and of PyTorch's functions around them.

A function mode notes each call outside modules; what a module does inside is its own.  From the tensor that backward
began with, the calls that led to it are followed back.  What no noted call has made is the step's batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tightfit._torch_private.dispatch import tree_leaves, tree_map
from tightfit.device import device_for
from tightfit.operators.facts import tensors_in

#: Calls of one optimizer step that are noted; a step of more is no step, but a whole training by one optimizer step.
_MOST_CALLS = 20_000
#: The result of a program whose last call was not seen to end.
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Stands for a tensor in the arguments of a call."""

    number: int


@dataclass(slots=True)
class _Call:
    target: Callable[..., Any]
    """A module, or a function of PyTorch's."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int]
    """Numbers of the tensors in its result, in order; of those that it writes, too."""
    autocast: torch.dtype | None
    with_gradients: bool


@dataclass(slots=True)
class _Described:
    """A tensor from outside: itself while it lives, and what is needed to make one like it."""

    alive: weakref.ref[torch.Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_made: bool
    """It has a graph, and nobody knows which calls made it."""
    name: str
    """What the script calls it; empty if unknown."""

    def get(self) -> torch.Tensor:
        """Return the tensor; one of zeros where it is gone."""
        found = self.alive()
        if found is not None:
            return found
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made.zero_()


@dataclass(slots=True)
class Program:
    """The calls that lead to one backward."""

    calls: list[_Call]
    result: int
    """Number of the tensor that backward begins with."""
    outside: dict[int, _Described] = field(default_factory=dict)
    """What no call has made, by number."""
    held: list[torch.Tensor] = field(default_factory=list)

    def hold(self) -> None:
        """Keep what comes from outside alive."""
        self.held = self.given

    @property
    def given(self) -> list[torch.Tensor]:
        """What comes from outside, parameters left out, as far as it is alive."""
        found = [one.alive() for one in self.outside.values()]
        return [tensor for tensor in found if tensor is not None and not isinstance(tensor, torch.nn.Parameter)]

    def let_go(self) -> None:
        """Let what comes from outside live as long as the script has it."""
        self.held.clear()

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The modules that are called, each once."""
        found = {id(call.target): call.target for call in self.calls if isinstance(call.target, torch.nn.Module)}
        return list(found.values())

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast around its modules; None without."""
        return next((c.autocast for c in self.calls if isinstance(c.target, torch.nn.Module) and c.autocast), None)

    @property
    def is_complete(self) -> bool:
        """Whether all that it needs is known."""
        return bool(self.modules) and not any(one.is_made for one in self.outside.values())

    @property
    def returns_loss(self) -> bool:
        """Whether backward begins with what a module returned, up to a factor."""
        return sum(not isinstance(call.target, torch.nn.Module) for call in self.calls) == 0


class SeenLoss:
    """The loss of a program, as `tightfit.Step` takes it: its batch is the tuple of what comes from outside."""

    def __init__(self, program: Program, model: torch.nn.Module, path_of: Callable[[torch.nn.Module], str]) -> None:
        resident = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._calls = [
            (path_of(call.target) if isinstance(call.target, torch.nn.Module) else call.target, call)
            for call in program.calls
        ]
        self._result = program.result
        self._numbers: list[int] = []
        self._named: dict[int, str] = {}
        batch: list[torch.Tensor] = []
        self.batch_names: list[str] = []
        """What the script calls these; empty where that is unknown."""
        for number, described in program.outside.items():
            tensor = described.get()
            if id(tensor) in resident:
                self._named[number] = resident[id(tensor)]
            else:
                self._numbers.append(number)
                batch.append(tensor.detach())
                if described.name or tensor.dim():  # not a scale, or the number of samples
                    self.batch_names.append(described.name)
        self.batch = tuple(batch)
        """What comes from outside the model."""

    def __call__(self, model: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """Make the calls again, and return the loss."""
        known: dict[int, torch.Tensor] = dict(zip(self._numbers, batch, strict=True))
        for number, name in self._named.items():
            owner, _, attribute = name.rpartition(".")
            known[number] = getattr(model.get_submodule(owner), attribute)
        with ExitStack() as opened:
            state: tuple[torch.dtype | None, bool] | None = None
            for target, call in self._calls:
                if state != (call.autocast, call.with_gradients):
                    opened.close()
                    state = call.autocast, call.with_gradients
                    opened.enter_context(torch.set_grad_enabled(call.with_gradients))
                    if call.autocast is not None:
                        opened.enter_context(device_for(model).autocast(call.autocast))
                function = model.get_submodule(target) if isinstance(target, str) else target
                args, kwargs = _with_tensors((call.args, call.kwargs), known)
                result = function(*args, **kwargs)
                made = tensors_of(result)
                if len(made) < len(call.outputs):  # written in place, and not returned
                    made = [*made, *(known[number] for number in call.outputs[len(made) :])]
                known.update(zip(call.outputs, made, strict=False))
        if self._result == UNKNOWN:
            return stand_in_loss(result)
        loss = known[self._result]
        return loss if loss.dim() == 0 else loss.sum()


def stand_in_loss(result: Any) -> torch.Tensor:
    """Return a scalar of what a model returned, where nobody knows what the script would have made of it."""
    loss = getattr(result, "loss", None)
    if isinstance(result, Mapping):
        loss = result.get("loss")
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    made = [tensor for tensor in tensors_of(result) if tensor.requires_grad and tensor.is_floating_point()]
    total = made[0].float().log_softmax(-1).mean() if made[0].dim() else made[0]
    for tensor in made[1:]:
        total = total + tensor.float().mean()
    return total


def _with_tensors(arguments: Any, known: Mapping[int, torch.Tensor]) -> Any:
    return tree_map(lambda leaf: known[leaf.number] if isinstance(leaf, _Tensor) else leaf, arguments)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """List the tensors in a result: in containers, and in the attributes of objects."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, torch.nn.Module | type) and not callable(leaf):
            found += tensors_in(tuple(vars(leaf).values()))
    return found


class ProgramRecorder(TorchFunctionMode):
    """Notes the calls that a script makes outside its modules, once it has called one.

    Attributes:
        is_open: whether calls are noted now; not inside modules, in backward or in the optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_open = False
        self._calls: list[_Call] = []
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._outside: dict[int, _Described] = {}
        self._next = 0
        self.named: Mapping[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        """What the script calls tensors, by id."""
        self._has_begun = False  # what is made before the first module's call is the batch

    def activate(self) -> None:
        """Push the mode on this thread's stack of modes."""
        self.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def deactivate(self) -> None:
        """Pop the mode, which must be on top of the stack."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def end_pass(self) -> None:
        """Note that backward is over: what is made until a module is called next is another batch."""
        self._has_begun = False

    def forget(self) -> None:
        """Begin anew, with the next optimizer step."""
        self._calls.clear()
        self._numbers.clear()
        self._outside.clear()
        self._has_begun = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.is_open and self._has_begun:
            name = getattr(func, "__name__", "")
            written = [args[0]] if name == "__setitem__" else []
            if written or tensors_in((result,)):
                self.note(func, args, kwargs, result, written)
        return result

    def note(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        written: Sequence[torch.Tensor] = (),
    ) -> None:
        """Note a call that was made."""
        if len(self._calls) >= _MOST_CALLS:
            return
        self._has_begun = True
        given = tree_map(self._stand_in, (args, kwargs))
        self._calls.append(
            _Call(
                target=target,
                args=given[0],
                kwargs=given[1],
                outputs=[self._number(tensor) for tensor in (*tensors_of(result), *written)],
                autocast=_ambient_autocast(args, kwargs, result),
                with_gradients=torch.is_grad_enabled(),
            )
        )

    def _stand_in(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        known = self._numbers.get(id(leaf))
        if known is None or known[0]() is not leaf:
            number = self._number(leaf)
            self._outside[number] = _Described(
                alive=weakref.ref(leaf),
                shape=leaf.shape,
                stride=leaf.stride(),
                dtype=leaf.dtype,
                device=leaf.device,
                is_made=leaf.grad_fn is not None,
                name=self._name_of(leaf),
            )
            return _Tensor(number)
        return _Tensor(known[1])

    def _name_of(self, tensor: torch.Tensor) -> str:
        known = self.named.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else ""

    def _number(self, tensor: torch.Tensor) -> int:
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        self._next += 1
        self._numbers[id(tensor)] = weakref.ref(tensor), self._next
        return self._next

    def leading_to(self, tensor: torch.Tensor) -> Program | None:
        """Return the calls that led to a tensor; None where no noted call made it."""
        known = self._numbers.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        needed = {known[1]}
        calls: list[_Call] = []
        for call in reversed(self._calls):
            if needed.intersection(call.outputs):
                calls.append(call)
                needed.update(
                    leaf.number for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, _Tensor)
                )
        outside = {number: one for number, one in self._outside.items() if number in needed}
        return Program(calls=calls[::-1], result=known[1], outside=outside)

    def begun(self) -> Program | None:
        """Return what was called so far as a program without a result; None if nothing was."""
        return Program(calls=list(self._calls), result=UNKNOWN, outside=dict(self._outside)) if self._calls else None


def _ambient_autocast(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> torch.dtype | None:
    tensors = tensors_in((*args, *kwargs.values(), result))
    return device_for(tensors[0] if tensors else "cpu").ambient_autocast()
