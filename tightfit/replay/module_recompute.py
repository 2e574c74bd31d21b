"""Running a module's whole forward again, by PyTorch's checkpoint, instead of a tape.

Where a block consists of many small operations and all that it saves is dropped, this costs less than a tape: nothing
is written down in forward, and no mode watches it.  But the module's Python code runs twice, which is only right where
a second forward is the same computation and leaves nothing behind.  So it is done only for modules of kinds that are
known to be like that (and tested), without hooks, called with tensors and constants; all others take the tape.

What is looked at before forward runs a second time, because `torch.utils.checkpoint` does not look: that weights,
arguments and the modules' modes are those of the first time.

Blind spots: a write that moves no version counter (`.data`, NumPy) to a weight or an argument, and a change of other
attributes of a module (a dropout's probability) between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import module as _nn_module
from torch.utils.checkpoint import checkpoint

from tightfit._torch_private import storage_key
from tightfit.errors import UnsupportedInput
from tightfit.replay.statistics import Statistics
from tightfit.replay.values import changed_error

_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)

#: Kinds of modules, by the Python module that defines them: each a pure function of its arguments, its parameters and
#: random numbers from PyTorch's generators.
_PURE: dict[str, str] = {
    "torch.nn.modules.activation": (
        "ReLU GELU SiLU Tanh Sigmoid Softmax LeakyReLU ELU Mish Hardswish Softplus MultiheadAttention"
    ),
    "torch.nn.modules.container": "Sequential ModuleList ModuleDict",
    "torch.nn.modules.conv": "Conv1d Conv2d Conv3d",
    "torch.nn.modules.dropout": "Dropout Dropout1d Dropout2d",
    "torch.nn.modules.flatten": "Flatten Unflatten",
    "torch.nn.modules.linear": "Identity Linear NonDynamicallyQuantizableLinear",
    "torch.nn.modules.normalization": "LayerNorm GroupNorm RMSNorm",
    "torch.nn.modules.pooling": "MaxPool2d AvgPool2d AdaptiveAvgPool2d",
    "torch.nn.modules.sparse": "Embedding",
    "torch.nn.modules.transformer": "TransformerEncoderLayer TransformerDecoderLayer",
    "tightfit.train.models.gpt": "Attention Block",
    "transformers.activations": "GELUActivation NewGELUActivation SiLUActivation",
    "transformers.pytorch_utils": "Conv1D",
    "transformers.models.bert.modeling_bert": (
        "BertAttention BertIntermediate BertLayer BertOutput BertSelfAttention BertSelfOutput"
    ),
    "transformers.models.convnext.modeling_convnext": "ConvNextDropPath ConvNextLayer ConvNextLayerNorm",
    "transformers.models.gpt2.modeling_gpt2": "GPT2Attention GPT2Block GPT2MLP",
    "transformers.models.llama.modeling_llama": "LlamaAttention LlamaDecoderLayer LlamaMLP LlamaRMSNorm",
    "transformers.models.t5.modeling_t5": (
        "T5Attention T5Block T5DenseActDense T5LayerCrossAttention T5LayerFF T5LayerNorm T5LayerSelfAttention"
    ),
    "transformers.models.vit.modeling_vit": "ViTAttention ViTLayer ViTMLP",
}
_pure = {f"{place}.{name}" for place, names in _PURE.items() for name in names.split()}

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


def allow_rerun(*kinds: type[torch.nn.Module]) -> None:
    """Allow plans to run the whole forward of modules of these classes again in backward, where that is faster.

    You promise that their forward is a function of its arguments, the module's parameters and buffers, and random
    numbers of PyTorch's own generators, and that running it twice leaves nothing behind: no cache, no counter, no
    statistics.  A block is run again only if its own class and those of all modules inside it are allowed.  Classes of
    `torch.nn` such as `Linear`, `LayerNorm`, `Dropout`, and the blocks of common transformers are allowed from the
    start.  Call this before `measure` or `fit`.

    Raises:
        UnsupportedInput: something that is no class of modules.
    """
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            raise UnsupportedInput(
                f"allow_rerun was given {kind!r}, which is no class of modules. It decides by class, not by module. "
                f"Pass the class itself, e.g. allow_rerun(MyBlock)."
            )
        _pure.add(f"{kind.__module__}.{kind.__qualname__}")


def is_pure(module: torch.nn.Module) -> bool:
    """The module and all below it are of kinds that may run again, and nobody watches or replaced their forward."""
    if any(getattr(_nn_module, name) for name in _GLOBAL_HOOKS):
        return False
    for below in module.modules():
        kind = type(below)
        own = vars(below)
        if f"{kind.__module__}.{kind.__qualname__}" not in _pure or own.get("inplace"):
            return False
        if own.get("max_norm") is not None:  # an embedding that scales its weight down in forward
            return False
        if below is not module and ("forward" in own or any(own[name] for name in _HOOKS)):
            return False
    return True


def are_plain(arguments: Any, kinds: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)) -> bool:
    """Tensors (of these very `kinds`) and constants, also in tuples, lists and dictionaries: nothing that a second call
    could find changed without notice.
    """
    if isinstance(arguments, torch.Tensor):
        return type(arguments) in kinds and arguments.layout is torch.strided
    if isinstance(arguments, _CONSTANTS):
        return True
    if type(arguments) in (tuple, list):
        return all(are_plain(argument, kinds) for argument in arguments)
    if type(arguments) is dict:
        return all(are_plain(argument, kinds) for argument in arguments.values())
    return False


def may_rerun(module: torch.nn.Module, args: Any, kwargs: Any) -> bool:
    """This call of the module may be made again in backward."""
    return are_plain(args) and are_plain(kwargs) and is_pure(module) and not _is_autocast(module)


def _is_autocast(module: torch.nn.Module) -> bool:
    """Weights that autocast has cast in forward may be found cast, or not, by the second forward."""
    first = next(module.parameters(), None)
    return first is not None and torch.is_autocast_enabled(first.device.type)


class ModuleCall:
    """One call of a module, made now and perhaps again in backward."""

    def __init__(
        self, module: torch.nn.Module, forward: Any, kwargs: dict[str, Any], statistics: Statistics, op_count: int
    ) -> None:
        """`op_count`: operations that a second run makes, by the plan."""
        self._forward = forward
        self._kwargs = kwargs
        self._statistics = statistics
        self._op_count = op_count
        self._modules = tuple(module.modules())
        self._modes = tuple([below.training for below in self._modules])
        self._tensors: tuple[tuple[torch.Tensor, int, int], ...] = ()
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []
        self._is_first = True

    def run(self, args: tuple[Any, ...]) -> Any:
        """Make the call."""
        return checkpoint(self, *args, use_reentrant=False, preserve_rng_state=False)

    def __call__(self, *args: Any) -> Any:
        """What `checkpoint` calls: in forward, and in backward when something is read."""
        if self._is_first:
            self._is_first = False
            return self._run_first(args)
        self._check()
        self._statistics.reruns += 1
        self._statistics.replayed_ops += self._op_count
        now = [(generator, generator.get_state()) for generator, _ in self._random]
        for generator, state in self._random:
            generator.set_state(state)
        try:
            return self._forward(*args, **self._kwargs)
        finally:
            for generator, state in now:
                generator.set_state(state)

    def _run_first(self, args: tuple[Any, ...]) -> Any:
        watched = [t for below in self._modules for t in (*below._parameters.values(), *below._buffers.values())]
        watched += _tensors_in((args, self._kwargs))
        tensors = [tensor for tensor in watched if tensor is not None]
        self._tensors = tuple([(tensor, storage_key(tensor), tensor._version) for tensor in tensors])
        generators = _generators(tensors)
        states = [generator.get_state() for generator in generators]
        result = self._forward(*args, **self._kwargs)
        # Only now is it known whether anything was random.
        self._random = [
            (generator, state)
            for generator, state in zip(generators, states, strict=True)
            if not torch.equal(generator.get_state(), state)
        ]
        return result

    def _check(self) -> None:
        for tensor, key, version in self._tensors:
            if storage_key(tensor) != key:
                raise changed_error(
                    tensor, "by giving it other memory (.data = ...) after the region that used it ended"
                )
            if tensor._version != version:
                raise changed_error(tensor, "in place after the region that used it ended")
        if tuple([below.training for below in self._modules]) != self._modes:
            raise RuntimeError(
                "tightfit cannot rebuild saved tensors: model.train() or model.eval() was called between forward and "
                "backward, and a block that is run again in backward would now compute something else. Call them "
                "before forward or after backward."
            )


def _generators(tensors: list[torch.Tensor]) -> list[torch.Generator]:
    """The default generators that a module of these tensors draws from."""
    found = [torch.default_generator]
    for index in {tensor.device.index for tensor in tensors if tensor.is_cuda}:
        found.append(torch.cuda.default_generators[index])
    return found


def _tensors_in(arguments: Any) -> list[torch.Tensor]:
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    if isinstance(arguments, tuple | list):
        return [tensor for argument in arguments for tensor in _tensors_in(argument)]
    return [t for argument in arguments.values() for t in _tensors_in(argument)] if isinstance(arguments, dict) else []
