"""Every private API of PyTorch that tightfit uses, each with the reason.

All were tested with PyTorch 2.11 (CUDA) and 2.13 (CPU).  Beside `distributed/_fsdp_private.py` and
`operators/_checkpoint_private.py`, nothing else in the package may touch `torch._*`, or an underscore attribute of an
object that PyTorch made.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from operator import attrgetter, methodcaller
from typing import Any, TypeVar

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

#: A tensor's version counter: the number of in-place writes to its storage, which autograd compares at unpack.
#: `attrgetter` is the fastest way to read it.
version_of: Callable[[torch.Tensor], int] = attrgetter("_version")

#: A module's own tables, without its children's: `parameters()` and `named_modules()` take two to four times as long.
own_parameters: Callable[[torch.nn.Module], dict[str, torch.nn.Parameter | None]] = attrgetter("_parameters")
own_buffers: Callable[[torch.nn.Module], dict[str, torch.Tensor | None]] = attrgetter("_buffers")
own_children: Callable[[torch.nn.Module], dict[str, torch.nn.Module | None]] = attrgetter("_modules")

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


#: What `Tensor.item()` dispatches to.
LOCAL_SCALAR = torch.ops.aten._local_scalar_dense.default


_MODULE_HOOKS = tuple(f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def has_module_hooks(module: torch.nn.Module) -> bool:
    """Tell whether a forward or backward hook is registered on the module. There is no public way to ask."""
    return any(vars(module)[name] for name in _MODULE_HOOKS)


def has_global_module_hooks() -> bool:
    """Tell whether a global module hook is registered (`torch.nn.modules.module.register_module_...`)."""
    return any(getattr(torch.nn.modules.module, f"_global{name}") for name in _MODULE_HOOKS)


def is_compiled(module: torch.nn.Module) -> bool:
    """Tell whether `torch.compile(module)` made the module, or `module.compile()` was called on it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


_DYNAMO = "torch._dynamo.eval_frame"


def hook_compiled_calls(enter: Callable[[], Callable[[], Any]] | None) -> None:
    """Have `enter` called at the start of each call of what `torch.compile` made, and at its end what that returned.

    Each such callable has a list of what to call then; it is read through here. None ends that.
    """
    dynamo = sys.modules.get(_DYNAMO)
    if dynamo is None:
        return
    kind, name = dynamo._TorchDynamoContext, "enter_exit_hooks"
    if enter is None:
        if name in vars(kind):
            delattr(kind, name)
        return

    def read(context: Any) -> Any:
        return _Hooks(enter, vars(context)[name])

    def write(context: Any, hooks: Any) -> None:
        vars(context)[name] = hooks

    setattr(kind, name, property(read, write))


class _Hooks:
    """A compiled callable's hooks, and one more in front."""

    def __init__(self, first: Callable[[], Any], hooks: list[Callable[[], Any]]) -> None:
        self._first = first
        self._hooks = hooks
        self.append = hooks.append

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        yield self._first
        yield from self._hooks


#: Where the functions are defined by which compiled graphs run forward and backward.
COMPILED_GRAPHS = "torch._functorch._aot_autograd.runtime_wrappers"


Function = TypeVar("Function", bound=Callable[..., Any])


def never_compiled(function: Function) -> Function:
    """Keep `torch.compile` out of a function and of all that it calls, at no cost to its calls.

    Beneath a dispatch mode a compiled callable runs eagerly, with the compiler still looking at every frame: it would
    compile the mode's own code, hundreds of frames, with objects made past their ``__init__``.
    `torch.compiler.disable` does the same by a wrapper, which each operation would pay for.
    """
    compiler = torch._C._dynamo.eval_frame
    skip = compiler._FrameAction.SKIP
    code: Any = getattr(function, "__code__")  # noqa: B009  # callables in general have none
    compiler.set_code_exec_strategy(code, compiler._FrameExecStrategy(skip, skip))
    return function


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

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def activate(self) -> None:
        """Push the mode on this thread's stack of modes."""
        self.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def deactivate(self) -> None:
        """Pop the mode, which must be on top of the stack."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated


#: Address of a tensor's StorageImpl, without building a Python storage object: a tape reads it for every argument.
storage_key: Callable[[torch.Tensor], int] = torch._C._storage_id  # type: ignore[attr-defined]  # not in PyTorch's stubs

_ADINPLACE = torch._C.DispatchKey.ADInplaceOrView


class WeakStorage:
    """A weak reference that reserves a StorageImpl's address without keeping its bytes alive."""

    __slots__ = ("_pointer",)

    def __init__(self, tensor: torch.Tensor) -> None:
        # The public weakref.ref(storage) reports when the storage dies; only this reference reserves its address.
        self._pointer = tensor.untyped_storage()._weak_ref()

    def __del__(self, free: Callable[[Any], None] = torch.UntypedStorage._free_weak_ref) -> None:
        if hasattr(self, "_pointer"):  # not in an object whose `__init__` has failed, or was never called
            free(self._pointer)


#: A detached alias of a strided tensor that shares its version counter, made without a dispatch: `detach()` would go
#: through the mode that records a region, at every saved tensor.  Inside `__torch_dispatch__` use `alias` instead.
alias_outside_dispatch: Callable[[type[torch.Tensor], torch.Tensor], torch.Tensor] = torch.Tensor._make_subclass


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached alias that shares the version counter.

    Inside `__torch_dispatch__` a bare `detach()` gets a counter of its own, because the ADInplaceOrView key is excluded
    there.  Later in-place writes would then go unnoticed.
    """
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False):
        return tensor.detach()


def plain_call(func: Any) -> Callable[..., Any]:
    """Return the builtin that an operator overload calls, without the Python method around it."""
    call: Callable[..., Any] = func._op if isinstance(func, OpOverload) else func
    return call


def version_counter(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor that shares the tensor's version counter but keeps none of its memory alive."""
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False), torch._C._DisableTorchDispatch():
        counter = tensor.detach()
        counter.data = _EMPTY
    return counter


_EMPTY = torch.empty(0)


class below_autograd:  # noqa: N801  (used as a statement, like torch.no_grad)
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


def set_grad_mode(enabled: bool) -> None:
    """Set the thread's grad mode inside `below_autograd`, which restores it.

    Some kernels read it: `mkldnn_rnn_layer` returns no workspace under no_grad.
    """
    torch._C._set_grad_enabled(enabled)


#: How many nodes of autograd's graph this thread has made, and a node's number among them.
graph_position: Callable[[], int] = torch._C._autograd._get_sequence_nr
position_of_node: Callable[[Any], int] = methodcaller("_sequence_nr")


def set_versions(tensors: list[torch.Tensor], versions: list[int]) -> None:
    """Set the version counters of tensors whose contents are again those of that version."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def tensor_hooks(tensor: torch.Tensor) -> dict[str, dict[int, Any] | None]:
    """Return a tensor's hook dictionaries by kind, None for a kind it never had. There is no public list of hooks."""
    return {name: getattr(tensor, name) for name in _TENSOR_HOOKS}


def drop_tensor_hooks(tensor: torch.Tensor, kind: str) -> None:
    """Reset the tensor's hooks of this kind to the state in which it never had one."""
    setattr(tensor, kind, None)


def no_function_modes() -> AbstractContextManager[None]:
    """Hide the calls made inside from function modes and tensor subclasses."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def storage_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor's storage in bytes, unseen by function modes: no memory is handed out here."""
    with no_function_modes():
        return tensor.untyped_storage().nbytes()


def dispatch_depth() -> int:
    """Count the dispatch modes on this thread's stack."""
    return torch._C._len_torch_dispatch_stack()


def top_saved_tensor_hooks() -> object:
    """Return the (pack, unpack) pair on top of this thread's stack of saved-tensor hooks, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def saved_tensor_hooks_allowed() -> bool:
    """Tell whether saved-tensor hooks may be pushed now: not inside `torch.func.grad` and its kin."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]  # not in PyTorch's stubs


def top_dispatch_mode() -> object:
    """Return the dispatch mode on top of this thread's stack, or None."""
    return torch.utils._python_dispatch._get_current_dispatch_mode()


def function_mode_depth() -> int:
    """Count the function modes on this thread's stack."""
    return int(torch._C._len_torch_function_stack())


def top_function_mode() -> object:
    """Return the function mode on top of this thread's stack, or None."""
    depth = function_mode_depth()
    return torch._C._get_function_stack_at(depth - 1) if depth else None


def current_graph_task() -> int:
    """Identify the backward pass that runs in this thread; -1 outside backward."""
    return torch._C._current_graph_task_id()


def backward_keeps_graph() -> bool:
    """Tell whether the backward pass that runs in this thread was called with ``retain_graph=True``."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def call_after_backward(callback: Callable[[], None]) -> None:
    """Have something called at the end of the backward pass that runs in this thread, unless that fails."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def current_graph_node() -> Any:
    """Return the autograd node whose backward runs in this thread; None outside backward."""
    return torch._C._current_autograd_node()


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


#: The class of the autograd nodes that a class of functions makes; its instances are what ``forward`` gets as ``ctx``.
node_class_of: Callable[[Any], type] = attrgetter("_backward_cls")


def is_view(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor is a view in autograd's sense, which holds a reference to its base."""
    return tensor._is_view()


def is_conj_or_neg(tensor: torch.Tensor) -> bool:
    """Tell whether the tensor has the lazy conjugate or negative bit set."""
    return tensor.is_conj() or tensor.is_neg()


def with_lazy_bits(tensor: torch.Tensor, conj: bool, neg: bool) -> torch.Tensor:
    """Return a view of the same bytes, read as conjugated and/or negated (lazy bits)."""
    if conj:
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if neg else tensor


def default_foreach(parameters: list[torch.Tensor]) -> bool:
    """Tell whether an optimizer with `foreach=None` would take its foreach path for these parameters."""
    from torch.optim.optimizer import _default_to_fused_or_foreach

    return bool(_default_to_fused_or_foreach(parameters, differentiable=False, use_fused=False)[1])


def clips_by_foreach(gradients: list[torch.Tensor], stand_in: type[torch.Tensor]) -> bool | None:
    """Return what to give `clip_grad_norm_` as `foreach` so that it does with gradients of the type `stand_in` what it
    does with tensors: True, or None where it decides by itself what it would decide for tensors, too.
    """
    from torch.utils._foreach_utils import _device_has_foreach_support

    alike = all(type(gradient) is stand_in and _device_has_foreach_support(gradient.device) for gradient in gradients)
    return True if gradients and alike else None


def profiler_memory_events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """List (time in ns, bytes) of each allocation (positive) and free (negative) of host memory, in order of time."""
    host = torch._C._autograd.DeviceType.CPU
    events = _kineto_events(profile)
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == host)


def profiler_ranges(profile: torch.profiler.profile, prefix: str) -> dict[str, tuple[int, int]]:
    """Return (start, end) in ns of each `record_function` range whose name starts with `prefix`, by its name."""
    return {
        e.name(): (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in _kineto_events(profile)
        if e.name().startswith(prefix)
    }


def _kineto_events(profile: torch.profiler.profile) -> list[Any]:
    profiler: Any = profile.profiler
    return list(profiler.kineto_results.events())


def is_traced() -> bool:
    """Tell whether `torch.jit.trace` records what runs now."""
    return torch._C._is_tracing()


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library (libkineto) from printing inside: it announces starts and stops, and missing GPUs.

    Whoever has set ``KINETO_LOG_LEVEL`` has chosen what it prints.  Else its level is changed where it lies, and put
    back, so that other profilers print what they always print; where a platform does not show it, nothing is silenced.
    """
    kineto = None if _KINETO_VARIABLE in os.environ else _kineto()
    if kineto is None:
        yield
        return
    library, level = kineto
    before = level.value
    try:
        level.value = _KINETO_SILENT
        if not before:  # the library will be initialised, which sets the level from the variable
            os.environ[_KINETO_VARIABLE] = str(_KINETO_SILENT)
        yield
    finally:
        if before:
            level.value = before
        else:
            os.environ.pop(_KINETO_VARIABLE, None)
            library.suppressLibkinetoLogMessages()  # the level that PyTorch chooses after initialising it


_KINETO_VARIABLE = "KINETO_LOG_LEVEL"
#: Above all that libkineto prints.
_KINETO_SILENT = 99


@cache
def _kineto() -> tuple[ctypes.CDLL, ctypes.c_int] | None:
    """Return libkineto, and the lowest level that it prints; 0 before it is initialised."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        library.suppressLibkinetoLogMessages  # noqa: B018  # AttributeError if there is none
        return library, ctypes.c_int.in_dll(library, "_ZN9libkineto6Logger14severityLevel_E")
    except (OSError, ValueError, AttributeError):
        return None


def profiler_is_running() -> bool:
    """Tell whether a profiler records in this process: only one can."""
    return bool(torch._C._autograd._profiler_enabled())


def ddp_runs_its_module() -> bool:
    """Tell whether a DistributedDataParallel is in the forward of the module that it wraps."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None


def ddp_begins(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether an op is the profiler mark that DDP sets before its forward, the first op that shows of it."""
    return func is MARK_BEGINS and bool(args) and args[0] == "DistributedDataParallel.forward"


#: The ops that begin and end a profiler's mark (`torch.profiler.record_function`).
MARK_BEGINS = torch.ops.profiler._record_function_enter_new.default
MARK_ENDS = torch.ops.profiler._record_function_exit._RecordFunction


def gradients_are_reduced(model: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Tell whether the backward that just ended has all-reduced all gradients.

    PyTorch itself checks only at the next forward, when the optimizer has used them.
    """
    try:
        model._check_reducer_finalized()
    except RuntimeError as error:
        if "finished reduction" not in str(error):
            raise
        return False
    return True


def find_overload(name: str) -> Any:
    """Look up an operator overload by a name such as ``aten.mm.default``; None if this PyTorch has none."""
    namespace, operator, overload = [*name.split("."), "", ""][:3]
    packet = getattr(getattr(torch.ops, namespace, None), operator, None)
    return getattr(packet, overload, None)


def current_cuda_stream(index: int) -> int:
    """Return the handle of this thread's current stream on a GPU.

    `torch.cuda.current_stream` makes a Python object for it, which takes 25 times as long (3.6 instead of 0.14 us).
    """
    return int(torch._C._cuda_getCurrentRawStream(index))


def cuda_allocator_settings() -> str:
    """Return the caching allocator's options as text: those last set in this process, else those of its environment."""
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)  # PyTorch 2.11 may lack it
    text = read() if read is not None else ""
    return text or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""


def _switch(name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return getattr(torch._C, f"_get_{name}"), getattr(torch._C, f"_set_{name}")


def _precision(library: str, kind: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    return partial(read, library, kind), partial(write, library, kind)


#: What reads and what sets each switch that decides which kernels the libraries choose, or how exactly these compute.
#: (`torch.backends` has them as properties of modules that take microseconds to read.)
_SWITCHES = (
    *(_switch(f"cudnn_{name}") for name in ("enabled", "benchmark", "deterministic")),
    *(_switch(f"mkldnn_{name}") for name in ("enabled", "deterministic")),
    *(_precision(library, kind) for library in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")),
)
_SMALLEST_NUMBER = 5e-324


def library_switches() -> tuple[Any, ...]:
    """Return how the libraries behind kernels are set, and whether this thread's processor flushes denormal numbers."""
    return *[read() for read, _ in _SWITCHES], _SMALLEST_NUMBER * 1.0 == 0.0


@contextmanager
def switched(wanted: tuple[Any, ...]) -> Iterator[None]:
    """Open a context in which the libraries are set as `library_switches` said once."""
    before = library_switches()
    _set_switches(before, wanted)
    try:
        yield
    finally:
        _set_switches(wanted, before)


def _set_switches(now: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for (_, write), old, new in zip(_SWITCHES, now[:-1], wanted[:-1], strict=True):
        if old != new:
            write(new)
    if now[-1] != wanted[-1]:
        torch.set_flush_denormal(wanted[-1])
