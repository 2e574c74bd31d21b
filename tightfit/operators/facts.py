"""Read from an operation's schema, once, what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tightfit._torch_private.dispatch import OpOverload, find_overload, plain_call, schema_of

#: Operations that write arguments which their schema does not mark: the positions of those arguments, and of the flag
#: that says whether they write. When they do, replay passes None: outputs are bit for bit the same and the running
#: statistics are not touched twice.
_UNDECLARED_WRITES: dict[str, tuple[tuple[int, ...], int]] = {
    "aten.native_batch_norm.default": ((3, 4), 5),
    "aten.cudnn_batch_norm.default": ((3, 4), 5),
    "aten.miopen_batch_norm.default": ((3, 4), 5),
}

#: Return memory whose contents are undefined: only a later write gives them a meaning, and a raw kernel's is invisible.
_UNINITIALISED = frozenset(
    {
        "aten.empty.memory_format",
        "aten.empty_like.default",
        "aten.empty_strided.default",
        "aten.empty_permuted.default",
        "aten.new_empty.default",
        "aten.new_empty_strided.default",
    }
)

#: In-place operations that give every element of their first argument a new value, whatever was there before: the only
#: ones through which uninitialised memory may be replayed.
_FULL_WRITERS = frozenset(
    """
    bernoulli_ cauchy_ copy_ exponential_ fill_ geometric_ log_normal_ normal_ random_ uniform_ zero_
    """.split()  # noqa: SIM905  # one word a line would be pages
)

#: Operations that change, or hand out, state that the tape cannot see.
_STATEFUL = frozenset(
    {
        "set_", "resize_", "resize_as_", "_resize_output_", "_cudnn_rnn", "_cudnn_init_dropout_state",
        "_efficientzerotensor",
    }
)  # fmt: skip

#: Parts of the names of namespaces whose operations talk to other processes, or change state that the tape cannot see.
_STATEFUL_NAMESPACES = ("c10d", "symm_mem", "fsdp", "inductor", "rngprims", "streams", "profiler", "rpc")

#: Kernels that use atomics where devices have them, as CUDA, so that a second run may differ in the last bits
#: (the list of torch.use_deterministic_algorithms, forward only).
_NONDETERMINISTIC_WITH_ATOMICS = frozenset(
    {
        "bincount", "cumsum", "cumsum_", "histc", "index_add", "index_add_", "index_copy", "index_copy_", "index_put",
        "index_put_", "index_reduce", "index_reduce_", "kthvalue", "median", "put", "put_", "scatter_add",
        "scatter_add_", "scatter_reduce", "scatter_reduce_", "_unsafe_index_put", "_scatter_reduce", "scatter",
        "scatter_", "_embedding_bag", "_ctc_loss", "nll_loss2d_forward", "ctc_loss", "_cudnn_ctc_loss",
    }
)  # fmt: skip

#: Operations known to be functions of their declared inputs and recorded random state alone, bit for bit, on every
#: back end that tightfit is tested on, and on CUDA by the source of their kernels or NVIDIA's word for cuBLAS and cuDNN
#: (with one workspace for each stream). Others are repeated before they are trusted (`tightfit.replay.repeats`).
#: mkldnn_rnn_layer is here because a self-check cannot judge it: its workspace has padding that no kernel writes or
#: reads, and that differs from run to run. A test compares the gradients instead.
_KNOWN_GOOD = frozenset(
    """
    _adaptive_avg_pool2d _log_softmax _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy abs add
    add_ addcmul addmm addmm_ alias_copy all amax amin any arange argmax argmin avg_pool2d baddbmm bernoulli
    bernoulli_ bitwise_and bitwise_not bitwise_or bmm cat ceil clamp clamp_ clamp_max clamp_min clone
    constant_pad_nd convolution copy copy_ cos cos_ div div_ dot elu embedding eq erf exp exp_ expm1 fill fill_
    flip floor full full_like gather ge gelu glu gt hardswish hardtanh index index_select isnan leaky_relu
    leaky_relu_ le lerp log log1p log2 logical_and logical_not logical_or logsumexp lt masked_fill masked_fill_
    max max_pool2d_with_indices maximum mean min minimum mish mkldnn_rnn_layer mm mul mul_ native_batch_norm
    cudnn_batch_norm native_dropout native_group_norm native_layer_norm ne neg neg_ new_full new_ones new_zeros
    nll_loss_forward ones ones_like pow rand rand_like randint randn randn_like reciprocal relu relu_ remainder
    repeat roll round rsqrt rsub sigmoid sigmoid_ sign silu silu_ sin sin_ slice_scatter softplus sort
    split_with_sizes_copy sqrt sqrt_ stack std sub sub_ sum tan tanh tanh_ topk tril triu unfold_copy
    upsample_bilinear2d upsample_nearest2d var var_mean where zero_ zeros zeros_like _unsafe_index linear
    scalar_tensor _fused_rms_norm _unsafe_view _safe_softmax
    """.split()  # noqa: SIM905  # one word a line would be pages
)


#: Of the known-good ones, those that are not where devices add atomically if this flag is set: a transposed convolution
#: is another one's backward, for which cuDNN has kernels that do.
_SUSPECT_WITH_ATOMICS = {"aten.convolution.default": "transposed"}

_CONVOLUTIONS = frozenset({"convolution", "_convolution", "cudnn_convolution", "cudnn_convolution_transpose"})

#: Operations that leave results uninitialised where no dropout is asked for, and which: the seeds of its masks, which
#: nothing reads then.
_UNDEFINED_WITHOUT_DROPOUT = {"aten._scaled_dot_product_cudnn_attention.default": (6, 7)}

#: What an operator's library does before its first call, by operations that show: cuDNN's recurrent layers make the
#: random state of their dropout.
_SETTING_UP = {
    "aten._cudnn_rnn.default": frozenset(
        {
            "aten.empty.memory_format",
            "aten.random_.default",
            "aten._local_scalar_dense.default",
            "aten._cudnn_init_dropout_state.default",
        }
    )
}


#: Parts of the names of operations that libraries compute.
_OF_LIBRARIES = (
    "conv", "mm", "linear", "matmul", "mv", "dot", "addr", "attention", "batch_norm", "lstm", "gru", "rnn", "cudnn",
    "mkldnn",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpInfo:
    """Facts of one operator overload."""

    func: Any
    call: Callable[..., Any]
    """How to call it with the least ado."""
    name: str
    is_view: bool
    """Returns an alias and writes nothing (or is not a tensor operation at all): never taped, never counted."""
    mutates: tuple[tuple[int, str], ...]
    """(position, name) of each argument that it writes."""
    is_random: bool
    """It may draw random numbers; see `draws`."""
    dropout_place: int
    """Position of the probability without which it draws none; -1: it always may."""
    is_uninitialised: bool
    """Its result has no defined contents."""
    is_full_writer: bool
    """Writes every element of its first argument without reading it."""
    splits_silently: bool
    """Returns parts of its argument that autograd takes for new tensors: one may be written while another is saved."""
    is_foreign: bool
    """Not PyTorch's own: nothing is known about it but its schema."""
    undeclared_writes: tuple[int, ...]
    """Positions of arguments that it writes although its schema does not say so."""
    training_flag: int
    """Position of the flag that switches `undeclared_writes` on; -1 if they always happen."""
    blocker: str
    """Why it may never be replayed; empty if it may."""
    blocker_with_atomics: str
    """Why it may not be replayed on a device that adds atomically; empty if it may."""
    needs_self_check: bool
    """Not on the known-good list: repeat it and compare, before trusting it."""
    suspect_flag: str
    """Name of the flag with which it is to be repeated, too, on a device that adds atomically; empty if none is."""
    is_convolution: bool
    """Libraries have several kernels for it, and choose one by themselves."""
    uses_libraries: bool
    """Libraries behind PyTorch compute it, by kernels and with a precision that switches choose."""
    may_set_up: bool
    """A library may run it before the first call of another one (see `setting_up`)."""
    may_differ: bool = field(init=False)
    """There are calls of it that are to be repeated."""
    is_quiet: bool = field(init=False)
    """It changes nothing that a tape knows: neither writes nor splits anything, and is PyTorch's own."""

    def __post_init__(self) -> None:
        loud = self.mutates or self.undeclared_writes or self.splits_silently or self.is_foreign
        object.__setattr__(self, "is_quiet", not loud)
        object.__setattr__(self, "may_differ", self.needs_self_check or bool(self.suspect_flag))


class OpaqueFunction:
    """A kind of opaque call, as it stands among the operations of a region; `opaque_function` has one for each name."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return self._name


#: What the names of opaque calls begin with, where the names of operators have a namespace.
_OPAQUE_PREFIX = "call."
_opaque: dict[str, OpaqueFunction] = {}


def opaque_function(function: Any) -> OpaqueFunction:
    """Return the kind of call for a class or function: the same for all that have its name."""
    return _opaque_named(f"{_OPAQUE_PREFIX}{function.__module__}.{function.__qualname__}")


def _opaque_named(name: str) -> OpaqueFunction:
    found = _opaque.get(name)
    return found if found is not None else _opaque.setdefault(name, OpaqueFunction(name))


def is_opaque(name: str) -> bool:
    """Tell whether an operation's name is that of an opaque call."""
    return name.startswith(_OPAQUE_PREFIX)


def operation_named(name: str) -> Any:
    """Return the operator overload or the kind of opaque call with a name; None if PyTorch has no such operator."""
    return _opaque_named(name) if is_opaque(name) else find_overload(name)


#: By the operator's `id`, as hashing an operator is a Python call; the facts hold the operator, so that no other can
#: get its number.
_INFO: dict[int, OpInfo] = {}
known_facts = _INFO.get


def describe(func: Any) -> OpInfo:
    """Return the facts about an operator overload (cached)."""
    info = _INFO.get(id(func))
    if info is None:
        info = _INFO[id(func)] = _describe(func)
    return info


def _describe(func: Any) -> OpInfo:
    if not isinstance(func, OpOverload):
        return OpInfo(
            func=func, call=func, name=str(func), is_view=False, mutates=(), is_random=False,
            dropout_place=-1, is_uninitialised=False,
            is_full_writer=False, splits_silently=False, is_foreign=True, undeclared_writes=(), training_flag=-1,
            blocker="" if isinstance(func, OpaqueFunction) else "a higher-order operator", blocker_with_atomics="",
            needs_self_check=True, suspect_flag="", is_convolution=False, uses_libraries=True, may_set_up=False,
        )  # fmt: skip
    schema = schema_of(func)
    name = str(func)
    base = schema.name.split("::")[-1]
    mutates = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    names = [argument.name for argument in schema.arguments]
    returns_alias = any(result.alias_info is not None for result in schema.returns)
    writes, flag = _UNDECLARED_WRITES.get(name, ((), -1))
    uninitialised = name in _UNINITIALISED
    is_foreign = func.namespace not in ("aten", "prims", "prim")
    own = "" if is_foreign else base  # what is known of PyTorch's operations says nothing of others with their names
    if func.namespace == "prim" or any(part in func.namespace for part in _STATEFUL_NAMESPACES):
        blocker = f"{func.namespace} operations are not replayed"
    elif own in _STATEFUL:
        blocker = "the operation changes state that the tape cannot see"
    else:
        blocker = ""
    return OpInfo(
        func=func,
        call=plain_call(func),
        name=name,
        is_view=(not mutates and returns_alias) or func.namespace in ("prim", "profiler"),
        mutates=mutates,
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        dropout_place=names.index("dropout_p") if "attention" in own and "dropout_p" in names else -1,
        is_uninitialised=uninitialised,
        is_full_writer=own in _FULL_WRITERS,
        splits_silently=own in ("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"),
        is_foreign=is_foreign,
        undeclared_writes=writes,
        training_flag=flag,
        blocker=blocker,
        blocker_with_atomics="not deterministic on this device" if own in _NONDETERMINISTIC_WITH_ATOMICS else "",
        needs_self_check=own not in _KNOWN_GOOD and not uninitialised,
        suspect_flag=_SUSPECT_WITH_ATOMICS.get(name, ""),
        is_convolution=own in _CONVOLUTIONS,
        uses_libraries=is_foreign or any(part in base for part in _OF_LIBRARIES),
        may_set_up=any(name in ones for ones in _SETTING_UP.values()),
    )


def mutated_tensors(info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the strided tensors among the arguments that the operation writes, in argument order."""
    found: list[torch.Tensor] = []
    for position, name in info.mutates:
        argument = args[position] if position < len(args) else kwargs.get(name)
        for tensor in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                found.append(tensor)
    return found


def undeclared_writes(info: OpInfo, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return the tensors that the call writes although the operation's schema does not say so."""
    if not info.undeclared_writes or (info.training_flag >= 0 and not args[info.training_flag]):
        return []
    return tensors_in([args[place] for place in info.undeclared_writes if place < len(args)])


def draws(info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether the call may draw random numbers: attention does only where it is asked for dropout."""
    place = info.dropout_place
    if not info.is_random or place < 0:
        return info.is_random
    return bool(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))


def undefined_results(info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the positions of results whose contents the call leaves undefined."""
    places = _UNDEFINED_WITHOUT_DROPOUT.get(info.name)
    if places is None:
        return ()
    return () if _argument(info, "dropout_p", args, kwargs) else places


def is_suspect(info: OpInfo, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether the call is to be repeated on a device that adds atomically, though its operation is known."""
    return bool(info.suspect_flag) and bool(_argument(info, info.suspect_flag, args, kwargs))


def _argument(info: OpInfo, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return an argument of a call by its name; None if it is left out."""
    names = [argument.name for argument in schema_of(info.func).arguments]
    place = names.index(name)
    return args[place] if place < len(args) else kwargs.get(name)


def setting_up(func: Any) -> frozenset[str]:
    """Return the names of the operations that the library of an operator may run before its first call."""
    return _SETTING_UP.get(str(func), frozenset())


def learn_undeclared_writes(func: Any, places: Iterable[int]) -> None:
    """Learn that an operation writes these arguments: later calls and measurements know it."""
    info = describe(func)
    known = tuple(sorted({*info.undeclared_writes, *places}))
    _INFO[id(func)] = replace(info, undeclared_writes=known, training_flag=-1)


def tensors_in(arguments: Any) -> list[torch.Tensor]:
    """Return the tensors in (possibly nested) argument lists, in order."""
    found: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += tensors_in(argument)
    return found


def result_tensors(result: Any) -> tuple[Any, ...]:
    """Return an operation's results as a tuple (positions kept; entries may be None or not tensors)."""
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, list | tuple):
        return tuple(result)
    return ()
