"""Tell which modules can be called a second time, and of which it is promised that they bear it.

Promised are pure functions of arguments, parameters and PyTorch's generators; of all others it has to be proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tightfit._torch_private.modules import (
    has_global_module_hooks,
    has_module_hooks,
    is_compiled,
    modules_in,
    own_parameters,
)
from tightfit.errors import UnsupportedInput

_WEIGHTS = {torch.nn.Parameter, type(None)}
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


def allow_recompute(*kinds: type[torch.nn.Module]) -> None:
    """Promise that plans may recompute whole calls of modules of these classes in backward: nothing is proven.

        tightfit.allow_recompute(MyBlock, MyNorm)
        applied = tightfit.fit(model, batch, budget="8GiB")

    Modules of any class are recomputed as a whole where that is faster, once a proof has shown that they bear it: at
    its first call each is called several times and compared, with its surroundings.  This spares the proof, for a class
    of which you know that its forward is a function of its arguments, the module's parameters and buffers, and random
    numbers of PyTorch's own generators, and that running it twice leaves nothing behind: no cache, no counter, no
    statistics.  It is spared only where the classes of all modules inside are promised, too.  Classes of `torch.nn`
    such as `Linear`, `LayerNorm`, `Dropout`, and the blocks of common transformers are from the start.  Call this
    before `measure` or `fit`.

    Args:
        kinds: classes of modules.

    Raises:
        UnsupportedInput: something that is no class of modules.
    """
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
            raise UnsupportedInput(
                f"allow_recompute was given {kind!r}, which is not a class of modules. It decides by class. "
                f"Pass the class itself, e.g. allow_recompute(MyBlock)."
            )
        _pure.add(f"{kind.__module__}.{kind.__qualname__}")


def is_pure(module: torch.nn.Module) -> bool:
    """Return whether a module and all below it are of kinds of which it is promised that they may run again."""
    for below in modules_in(module):
        kind = type(below)
        own = vars(below)
        if f"{kind.__module__}.{kind.__qualname__}" not in _pure or own.get("inplace") or is_compiled(below):
            return False
        if own.get("max_norm") is not None:  # an embedding that scales its weight down in forward
            return False
    return is_bare(module)


def is_bare(module: torch.nn.Module) -> bool:
    """Return whether nothing runs in a module's call but the forwards of its classes: no hooks, no replaced forward."""
    return _are_bare(modules_in(module))


def _are_bare(modules: Sequence[torch.nn.Module]) -> bool:
    """Return that of a module, given it and all below it, itself first."""
    if has_global_module_hooks():
        return False
    for below in modules[1:]:  # noqa: SIM110  # asked at every such call: a loop takes half the time
        if "forward" in vars(below) or has_module_hooks(below):
            return False
    return True


def are_plain(arguments: Any, kinds: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)) -> bool:
    """Return whether arguments are tensors (of these very `kinds`) and constants, or tuples, lists and dicts of them.

    A second call could find none of these changed without notice.
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


def has_own_weights(module: torch.nn.Module) -> bool:
    """Return whether the module has parameters where it should.

    Inside `torch.func.functional_call` it has other tensors there, and in backward its own ones again.
    """
    return _have_own_weights(modules_in(module))


def _have_own_weights(modules: Sequence[torch.nn.Module]) -> bool:
    weights = [weight for below in modules for weight in own_parameters(below).values()]
    if set(map(type, weights)) <= _WEIGHTS:
        return True
    return all(weight is None or isinstance(weight, torch.nn.Parameter) for weight in weights)


def can_call_again(modules: Sequence[torch.nn.Module], args: Any, kwargs: Any) -> bool:
    """Return whether a call of a module can be made again in backward, as far as can be told before.

    `modules`: it and all below it, itself first.
    """
    return are_plain(args) and are_plain(kwargs) and _are_bare(modules) and _have_own_weights(modules)
