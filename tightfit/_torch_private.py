"""Every underscore API of PyTorch that tightfit uses, each with the reason and the versions it was seen working in.

All were used with PyTorch 2.11 (CUDA) and 2.13 (CPU).  Nothing else in the package may touch `torch._*`,
or an underscore attribute of what PyTorch makes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

#: How often a tensor's storage was written; autograd compares it at unpack. `attrgetter` is the fastest door.
version_of: Callable[[torch.Tensor], int] = attrgetter("_version")

#: A module's own tables, without its children's: `parameters()` and `named_modules()` take two to four times as long.
own_parameters: Callable[[torch.nn.Module], dict[str, torch.nn.Parameter | None]] = attrgetter("_parameters")
own_buffers: Callable[[torch.nn.Module], dict[str, torch.Tensor | None]] = attrgetter("_buffers")
own_children: Callable[[torch.nn.Module], dict[str, torch.nn.Module | None]] = attrgetter("_modules")

#: An operator overload's schema: which arguments it writes, and their names.
schema_of: Callable[[Any], Any] = attrgetter("_schema")

#: What `Tensor.item()` dispatches to.
LOCAL_SCALAR = torch.ops.aten._local_scalar_dense.default


_MODULE_HOOKS = tuple(f"_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def has_module_hooks(module: torch.nn.Module) -> bool:
    """Whether anybody hooked the module's forward or backward. There is no public way to ask."""
    return any(vars(module)[name] for name in _MODULE_HOOKS)


def has_global_module_hooks() -> bool:
    """Whether anybody hooked every module's forward or backward (`torch.nn.modules.module.register_module_...`)."""
    return any(getattr(torch.nn.modules.module, f"_global{name}") for name in _MODULE_HOOKS)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile(module)` made the module, or `module.compile()` was called on it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class DispatchMode(TorchDispatchMode):
    """A dispatch mode with annotated methods. Subclasses define `__torch_dispatch__`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def activate(self) -> None:
        """Put it on this thread's stack of modes."""
        self.__enter__()  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated

    def deactivate(self) -> None:
        """Take it off; it must be on top."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # PyTorch's modes are not annotated


#: Address of a tensor's StorageImpl, without building a Python storage object: a tape asks for it on every argument.
storage_key: Callable[[torch.Tensor], int] = torch._C._storage_id  # type: ignore[attr-defined]  # not in PyTorch's stubs

_ADINPLACE = torch._C.DispatchKey.ADInplaceOrView


class WeakStorage:
    """Keeps a StorageImpl's address from being reused, without keeping its bytes."""

    __slots__ = ("_pointer",)

    def __init__(self, tensor: torch.Tensor) -> None:
        # The public weakref.ref(storage) tells when the storage dies; only this reference reserves its address.
        self._pointer = tensor.untyped_storage()._weak_ref()

    def __del__(self, free: Callable[[Any], None] = torch.UntypedStorage._free_weak_ref) -> None:
        free(self._pointer)


#: A detached alias of a strided tensor that shares its version counter, made without any mode seeing it: `detach()`
#: would be dispatched to the very mode that watches a region, at every saving.  Not inside `__torch_dispatch__`, see
#: `alias`.
alias_outside_dispatch: Callable[[type[torch.Tensor], torch.Tensor], torch.Tensor] = torch.Tensor._make_subclass


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A detached alias that shares the version counter.

    Inside `__torch_dispatch__` a bare `detach()` gets a counter of its own, because the ADInplaceOrView key is excluded
    there; later in-place writes would then go unnoticed.
    """
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False):
        return tensor.detach()


def plain_call(func: Any) -> Callable[..., Any]:
    """What calling an operator overload comes to, without the Python method around it."""
    call: Callable[..., Any] = func._op if isinstance(func, OpOverload) else func
    return call


def version_counter(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor whose `_version` moves with the tensor's, and that keeps none of its memory alive."""
    with torch._C._SetExcludeDispatchKeyGuard(_ADINPLACE, False), torch._C._DisableTorchDispatch():
        counter = tensor.detach()
        counter.data = _NOTHING
    return counter


_NOTHING = torch.empty(0)


class below_autograd:  # noqa: N801  (used as a statement, like torch.no_grad)
    """Run operations as a kernel would: no autograd, no dispatch modes, no autocast.  Grad mode is restored at the end.

    A plain class instead of an ExitStack: it is entered at every read of a dropped tensor.
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


def set_grad_mode(enabled: bool) -> None:
    """Set the thread's grad mode without a context manager; the caller's `below_autograd` restores it.

    Some kernels consult it (`mkldnn_rnn_layer` returns no workspace under no_grad).
    """
    torch._C._set_grad_enabled(enabled)


def set_versions(tensors: list[torch.Tensor], versions: list[int]) -> None:
    """Set version counters: of tensors that have again the contents that they had at that version."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def tensor_hooks(tensor: torch.Tensor) -> dict[str, dict[int, Any] | None]:
    """The dictionaries of a tensor's hooks by kind, None where it never had one: there is no public list of them."""
    return {name: getattr(tensor, name) for name in _TENSOR_HOOKS}


def drop_tensor_hooks(tensor: torch.Tensor, kind: str) -> None:
    """Make the tensor one that never had hooks of this kind."""
    setattr(tensor, kind, None)


def no_function_modes() -> AbstractContextManager[None]:
    """Inside, neither function modes nor subclasses see what is called."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def storage_bytes(tensor: torch.Tensor) -> int:
    """Size of a tensor's storage, asked for without any function mode noticing: asking hands nothing out."""
    with no_function_modes():
        return tensor.untyped_storage().nbytes()


def dispatch_depth() -> int:
    """How many dispatch modes are on this thread's stack."""
    return torch._C._len_torch_dispatch_stack()


def top_saved_tensor_hooks() -> object:
    """The (pack, unpack) pair on top of this thread's stack of saved-tensor hooks, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def saved_tensor_hooks_allowed() -> bool:
    """Whether saved-tensor hooks may be pushed now: not inside `torch.func.grad` and its kin."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]  # not in PyTorch's stubs


def top_dispatch_mode() -> object:
    """The dispatch mode on top of this thread's stack, or None."""
    return torch.utils._python_dispatch._get_current_dispatch_mode()


def function_mode_depth() -> int:
    """How many function modes are on this thread's stack."""
    return int(torch._C._len_torch_function_stack())


def top_function_mode() -> object:
    """The function mode on top of this thread's stack, or None."""
    depth = function_mode_depth()
    return torch._C._get_function_stack_at(depth - 1) if depth else None


def current_graph_task() -> int:
    """Identity of the backward pass that runs in this thread; -1 outside backward."""
    return torch._C._current_graph_task_id()


def current_graph_node() -> Any:
    """The node of the graph whose backward runs in this thread; None outside backward."""
    return torch._C._current_autograd_node()


def is_view(tensor: torch.Tensor) -> bool:
    """Autograd made the tensor as a view, which refers to its base."""
    return tensor._is_view()


def is_conj_or_neg(tensor: torch.Tensor) -> bool:
    """The tensor's bytes are to be read as conjugated or negated (lazy bits)."""
    return tensor.is_conj() or tensor.is_neg()


def with_lazy_bits(tensor: torch.Tensor, conj: bool, neg: bool) -> torch.Tensor:
    """The same bytes, read as conjugated and/or negated."""
    if conj:
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if neg else tensor


def default_foreach(parameters: list[torch.Tensor]) -> bool:
    """Whether an optimizer with `foreach=None` would take its foreach path for these parameters."""
    from torch.optim.optimizer import _default_to_fused_or_foreach

    return bool(_default_to_fused_or_foreach(parameters, differentiable=False, use_fused=False)[1])


def profiler_memory_events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """(time in ns, bytes) of each allocation (positive) or free (negative) that the profiler saw, in order of time."""
    return sorted((e.start_ns(), e.nbytes()) for e in _kineto_events(profile) if e.name() == "[memory]")


def profiler_ranges(profile: torch.profiler.profile, prefix: str) -> dict[str, tuple[int, int]]:
    """(start, end) in ns of each `record_function` range whose name starts with `prefix`."""
    return {
        e.name(): (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in _kineto_events(profile)
        if e.name().startswith(prefix)
    }


def _kineto_events(profile: torch.profiler.profile) -> list[Any]:
    profiler: Any = profile.profiler
    return list(profiler.kineto_results.events())


def profiler_is_running() -> bool:
    """Whether a profiler records in this process: only one can."""
    return bool(torch._C._autograd._profiler_enabled())


def ddp_runs_its_module() -> bool:
    """Whether a DistributedDataParallel is calling the module that it wraps now."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None


def ddp_begins(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation is the mark that DDP sets for profilers before its forward: the first that shows of it."""
    return func is MARK_BEGINS and bool(args) and args[0] == "DistributedDataParallel.forward"


#: The operations that begin and end a profiler's mark (`torch.profiler.record_function`).
MARK_BEGINS = torch.ops.profiler._record_function_enter_new.default
MARK_ENDS = torch.ops.profiler._record_function_exit._RecordFunction


def gradients_are_reduced(model: torch.nn.parallel.DistributedDataParallel) -> bool:
    """Whether the backward that just ended has exchanged all gradients; PyTorch itself only asks at the next forward,
    when the optimizer has used them.
    """
    try:
        model._check_reducer_finalized()
    except RuntimeError as error:
        if "finished reduction" not in str(error):
            raise
        return False
    return True


def find_overload(name: str) -> Any:
    """The operator overload of a name such as ``aten.mm.default``; None if this PyTorch has none."""
    namespace, operator, overload = [*name.split("."), "", ""][:3]
    packet = getattr(getattr(torch.ops, namespace, None), operator, None)
    return getattr(packet, overload, None)


def cuda_process_bytes(device: torch.device) -> int | None:
    """Bytes that this process holds on a CUDA device, by the driver's account; None where it cannot be told."""
    try:
        import pynvml  # type: ignore[import-not-found]  # nvidia-ml-py, as in torch.cuda.list_gpu_processes
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        index = torch.cuda._get_nvml_device_index(device)
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        import os

        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    except pynvml.NVMLError:
        return None
    return None
