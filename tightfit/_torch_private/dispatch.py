"""The dispatcher: its modes, keys, operators and transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import register_pytree_node as register_pytree_node
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

from tightfit._torch_private.compiling import never_compiled

#: An operator overload's schema: the names of its arguments, and which of them it writes.
schema_of: Callable[[Any], Any] = attrgetter("_schema")


def fake_mode() -> FakeTensorMode:
    """Return a mode that makes tensors without data, and runs nothing for real.

    Asking for the memory's address is an error. PyTorch's default answers with the null pointer and a warning: a kernel
    that is called past the dispatcher (Triton, an extension, ctypes) would be launched with it.  So is an operation
    that has no fake kernel.  By default PyTorch runs it on real zeros of full size, in memory that nobody counts.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=False, allow_fallback_kernels=False)
    mode._allow_unsafe_data_ptr_access = False  # read when a fake tensor is made; the public switch is process-wide
    return mode


#: What `data_ptr` says in Python; what C++'s typed one says; and what `Tensor.numpy` does, whose array is its memory.
_NO_ADDRESS = ("Cannot access data pointer", "its data is not allocated yet", ".numpy() is not supported")


def lacks_an_address(error: BaseException) -> bool:
    """Tell whether an error says that code asked a tensor without data for its address."""
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_ADDRESS)


#: What asking a tensor for its device dispatches to, where it is not where its data seem to be (a fake tensor).
DEVICE = torch.ops.prim.device.default


def fake_device_of(tensor: torch.Tensor) -> torch.device | None:
    """Return the device that a fake tensor stands for, without a dispatch, which takes longer than a kernel without
    data; None of any other tensor.
    """
    return tensor.fake_device if type(tensor) is FakeTensor else None


#: What `Tensor.item()` dispatches to.
LOCAL_SCALAR = torch.ops.aten._local_scalar_dense.default


class DispatchMode(TorchDispatchMode):
    """A dispatch mode with annotated methods. Subclasses define `__torch_dispatch__`, which is never compiled."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated
        never_compiled(cls.__torch_dispatch__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch's own wrapper around `__torch_dispatch__`, which costs each operation: see above

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have what `torch.compile` made compiled and run compiled beneath the mode, as without it."""
        return True

    supports_higher_order_operators = True  # `torch.cond` and its kin come as operations

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def activate(self) -> None:
        """Push the mode on this thread's stack of modes."""
        self.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def deactivate(self) -> None:
        """Pop the mode, which must be on top of the stack."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated


#: Count the dispatch modes on this thread's stack.
dispatch_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack

#: Count the function modes on this thread's stack.
function_mode_depth: Callable[[], int] = torch._C._len_torch_function_stack

#: Asked for every operation, so looked up once.
_mode_of: Callable[[Any], object] = torch._C._get_dispatch_mode
_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def is_traced(has_data: bool = True) -> bool:
    """Tell whether somebody traces operations of this thread, which compute nothing; `has_data`: the step's own do.

    `torch.cond` and its kin trace their branches at each call, beneath all modes and saved-tensor hooks of the step.
    """
    return _mode_of(_PROXY) is not None or (has_data and _mode_of(_FAKE) is not None)


def leave_own_modes_in_node() -> None:
    """Take our modes off the top of this thread's stack, until the node of a backward that runs now has ended.

    Before and after each node autograd's engine puts the thread's state back, and the stack with it.
    """
    while isinstance(top_dispatch_mode(), DispatchMode):
        torch._C._pop_torch_dispatch_stack(None)


def follow_dispatch_stack() -> None:
    """Let this thread's dispatch keys say what its stack of modes is, after a call of something compiled.

    Such a call puts back the keys that it found, also where what it ran has pushed modes on the stack, or popped them.
    """
    stacked = dispatch_depth() > 0
    if torch._C._dispatch_tls_local_include_set().has(torch._C.DispatchKey.Python) is stacked:
        return
    if stacked:
        torch._C._push_on_torch_dispatch_stack(torch._C._pop_torch_dispatch_stack(None))
    else:
        torch._C._push_on_torch_dispatch_stack(DispatchMode())
        torch._C._pop_torch_dispatch_stack(None)


def plain_call(func: Any) -> Callable[..., Any]:
    """Return the builtin that an operator overload calls, without the Python method around it."""
    call: Callable[..., Any] = func._op if isinstance(func, OpOverload) else func
    return call


class below_autograd:  # noqa: N801  # used as a statement, like torch.no_grad
    """Run ops without autograd, dispatch modes and autocast, and restore grad mode at the end.

    A plain class instead of an ExitStack for speed: it is entered at every read of a dropped tensor.
    """

    __slots__ = ("_grad", "_guards")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._guards = (
            torch._C._AutoDispatchBelowAutograd(),
            torch._C._DisableTorchDispatch(),
            torch._C._DisableAutocast(),
        )
        for guard in self._guards:
            guard.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's guard is not annotated

    def __exit__(self, *error: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._grad)


#: Included while a backward with ``is_grads_batched=True`` runs; then no random operation may.
_BATCHED_BACKWARD = torch._C._dispatch_key_parse("VmapMode")


def outside_batched_backward() -> AbstractContextManager[object]:
    """Open a context in which operations run as if no backward with ``is_grads_batched=True`` ran around them."""
    if not torch._C._dispatch_tls_local_include_set().has(_BATCHED_BACKWARD):
        return nullcontext()
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_BATCHED_BACKWARD))


def no_function_modes() -> AbstractContextManager[None]:
    """Hide the calls made inside from function modes and tensor subclasses."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def top_dispatch_mode() -> object:
    """Return the dispatch mode on top of this thread's stack, or None."""
    return torch.utils._python_dispatch._get_current_dispatch_mode()


def top_function_mode() -> object:
    """Return the function mode on top of this thread's stack, or None."""
    depth = function_mode_depth()
    return torch._C._get_function_stack_at(depth - 1) if depth else None


def current_dispatch_keys() -> tuple[Any, Any]:
    """Return the dispatch keys that this thread includes and excludes, those of dispatch modes left out."""
    keys, included = torch._C.DispatchKey, torch._C._dispatch_tls_local_include_set()
    included = included.remove(keys.Python).remove(keys.PythonTLSSnapshot)
    return included, torch._C._dispatch_tls_local_exclude_set()


@contextmanager
def dispatching_by(keys: tuple[Any, Any]) -> Iterator[None]:
    """Dispatch inside by these keys, and past all dispatch modes: also beneath `below_autograd` as in a forward."""
    with torch.utils._python_dispatch._disable_current_modes(), torch._C._ForceDispatchKeyGuard(*keys):
        yield


def is_inside_transform() -> bool:
    """Tell whether any transform of `torch.func` runs now, `vmap` among them."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_transformed() -> bool:
    """Tell whether a transform of `torch.func` runs now that differentiates (grad, jvp, ...), beneath autograd's own
    graph. What `vmap` alone runs is saved by autograd as ever.
    """
    if not is_inside_transform():
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(one.key() != vmap for one in torch._C._functorch.get_interpreter_stack() or ())


def ddp_begins(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether an op is the profiler mark that DDP sets before its forward, the first op that shows of it."""
    return func is MARK_BEGINS and bool(args) and args[0] == "DistributedDataParallel.forward"


#: The ops that begin and end a profiler's mark (`torch.profiler.record_function`).
MARK_BEGINS = torch.ops.profiler._record_function_enter_new.default


MARK_ENDS = torch.ops.profiler._record_function_exit._RecordFunction


def find_overload(name: str) -> Any:
    """Look up an operator overload by a name such as ``aten.mm.default``; None if this PyTorch has none."""
    namespace, operator, overload = [*name.split("."), "", ""][:3]
    packet = getattr(getattr(torch.ops, namespace, None), operator, None)
    return getattr(packet, overload, None)
