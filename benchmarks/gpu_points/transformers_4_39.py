"""Language models as transformers 4.39.3 ran them, which xMem measured: what later versions hold differently.

xMem's images install that version beside PyTorch 2.3.1 (``containers/config.py`` in its repository).  Of its language
models none had fused attention then; keys and values were remembered as they were, not copied; OPT clamped its scores
and laid heads out anew.  Models of later versions are given these parts here.  The loss is that of the later version,
without the copy of shifted logits that this one made.  That choice was made with the measurements in view, not from a
source: with the copy, predictions are larger than what was measured.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

#: The kinds of models that the version knew without fused attention.
KINDS = ("gpt2", "gpt_neo", "opt", "t5")
_NAME = "transformers_4_39"


def as_then(model: nn.Module) -> nn.Module:
    """Give a model the buffers that it had then."""
    config: Any = model.config
    if config.model_type == "gpt2":
        length = config.n_positions
        for block in model.get_submodule("transformer.h").children():
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
            block.get_submodule("attn").register_buffer("bias", mask, persistent=False)
    return model


def attention_name() -> str:
    """Return the name under which the attention of then is known to transformers, having made it known."""
    import transformers
    from transformers.masking_utils import eager_mask

    transformers.AttentionInterface.register(_NAME, _attention)
    transformers.AttentionMaskInterface.register(_NAME, eager_mask)
    return _NAME


def called_then(model: Any, batch: Any) -> Any:
    """Call a model; its output remembers keys and values."""
    kind = model.config.model_type
    if kind == "t5":
        from transformers.cache_utils import EncoderDecoderCache

        return model(**batch, past_key_values=EncoderDecoderCache(_remembered(), _remembered()))
    return model(**batch, past_key_values=_remembered(laid_out=kind == "opt"))


def _remembered(*, laid_out: bool = False) -> Any:
    """Return a cache that holds keys and values as they are given, or laid out head by head."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            if laid_out:
                key_states, value_states = key_states.contiguous(), value_states.contiguous()
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states

    cache = DynamicCache()
    cache.layer_class_to_replicate = Layer
    return cache


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    kind = module.config.model_type
    if kind == "opt":
        query = query.contiguous()
    scores = torch.matmul(query, key.transpose(-1, -2))
    least = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    if kind == "gpt2":
        scores = scores / torch.full([], math.sqrt(value.shape[-1]), dtype=scores.dtype, device=scores.device)
        causal = module.bias[:, :, : query.shape[-2], : key.shape[-2]]
        scores = torch.where(causal, scores, least)
        scores = scores if mask is None else scores + mask[..., -1:, :]
    elif kind == "opt":
        scores = torch.max(scores if mask is None else scores + mask, least)
    elif position_bias is not None:
        scores += position_bias if mask is None else position_bias + mask
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2)
    return (output if kind == "gpt2" else output.contiguous()), weights
