"""Building what was trained: models without weights, their batches, losses and optimizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu_points import litgpt_models, megatron_models, torchtitan_models
from benchmarks.gpu_points.points import Point
from tightfit.errors import UnsupportedInput
from tightfit.step.weightless import without_weights

#: xMem truncates to so many tokens and pads to the longest sample of a batch, of which there are several.
_TOKENS = 128
_NO_LABEL = -100
#: The version in which xMem measured language models: ``exp_base_config`` of its ``paper_container/config.py``, beside
#: PyTorch 2.6; the loop is ``exp/trainer/train_loop.py`` (@5aad72f, 0fa57ba).
TRANSFORMERS = "4.51.3"

#: torchvision's name, and the classes, of what xMem calls so.
_TORCHVISION = {
    "ConvNeXtTiny": ("convnext_tiny", 1000),
    "ConvNeXtBase": ("convnext_base", 1000),
    "MnasNet": ("mnasnet1_0", 10),
    "MobeNetV3Large": ("mobilenet_v3_large", 10),
    "MobeNetV3Small": ("mobilenet_v3_small", 10),
    "MobileNetV2": ("mobilenet_v2", 1000),
    "RegNetX400MF": ("regnet_x_400mf", 1000),
    "RegNetY400MF": ("regnet_y_400mf", 1000),
    "ResNet101": ("resnet101", 1000),
    "ResNet152": ("resnet152", 1000),
    "VGG16": ("vgg16", 1000),
    "VGG19": ("vgg19", 1000),
}

#: Type and settings of what is published under each name, some of which can be read only with an account.
_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "openai-community/gpt2": ("gpt2", {}),
    "distilbert/distilgpt2": ("gpt2", {"n_layer": 6}),
    "cerebras/Cerebras-GPT-111M": (
        "gpt2",
        {
            "n_layer": 10,
            "n_inner": 3072,
            "n_positions": 2048,
            "activation_function": "gelu",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "EleutherAI/gpt-neo-125M": (
        "gpt_neo",
        {
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "attention_types": [[["global", "local"], 6]],
        },
    ),
    "T5-small": ("t5", {"decoder_start_token_id": 0}),
    "facebook/opt-125m": ("opt", {}),
    "facebook/opt-350m": (
        "opt",
        {
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "do_layer_norm_before": False,
        },
    ),
    "Qwen/Qwen3-4B": (
        "qwen3",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        "qwen2",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
    ),
    "google/gemma-2-2b-it": (
        "gemma2",
        {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        "llama",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
}

_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


class Loss:
    """A loop's loss, whose variables name the output until the next one is there.

    What they hold of it is the tensors: backward has freed what its graph had saved.
    """

    def __init__(self, call: Callable[[Any, Any], Any], loss: Callable[[Any, Any], torch.Tensor]) -> None:
        self._call = call
        self._loss = loss
        self.named: list[Any] = []

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        output = self._call(model, batch)
        self.named = [tensor.detach() for tensor in _tensors_below(output)]
        return self._loss(output, batch)


def _tensors_below(thing: Any, depth: int = 12) -> Iterator[torch.Tensor]:
    """Yield the tensors that an output holds, those of its caches of keys and values too."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth and isinstance(thing, list | tuple | Mapping):
        for one in thing.values() if isinstance(thing, Mapping) else thing:
            yield from _tensors_below(one, depth - 1)
    elif depth and hasattr(thing, "__dict__"):
        yield from _tensors_below(list(vars(thing).values()), depth - 1)


def built(point: Point) -> tuple[nn.Module, Any, Callable[..., Any], torch.optim.Optimizer | None]:
    """Return the model, a batch, the loss and the optimizer of a point, all without data."""
    if point.table in _OF_ITS_OWN:
        return _OF_ITS_OWN[point.table](point)
    with without_weights():
        model = _vision(point) if point.image_size is not None else _language(point.model)
    model.train()
    optimizer = _OPTIMIZERS[point.optimizer](model.parameters())
    if point.image_size is not None:
        images = torch.empty(point.batch_size, 3, point.image_size, point.image_size, device="meta")
        labels = torch.empty(point.batch_size, dtype=torch.long, device="meta")
        loss = Loss(lambda model, batch: model(batch[0]), lambda output, batch: F.cross_entropy(output, batch[1]))
        return model, (images, labels), loss, optimizer
    tokens = torch.zeros(point.batch_size, _TOKENS, dtype=torch.long)
    mask = torch.ones_like(tokens)
    mask[-1, _TOKENS // 2 :] = 0  # wikitext has short lines: a batch is padded, and its mask cannot be left out
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, _NO_LABEL)}
    return model, batch, Loss(lambda model, batch: model(**batch), lambda output, _: output.loss), optimizer


def _vision(point: Point) -> nn.Module:
    if point.table == "timm":
        import timm

        timm.layers.set_fused_attn(False)  # the PyTorch of these rows had no fused attention
        module: nn.Module = timm.create_model(_TIMM_NAMES.get(point.model, point.model))
        return module
    import torchvision

    name, classes = _TORCHVISION[point.model]
    found: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    return found


def _litgpt(point: Point) -> tuple[nn.Module, Any, Loss, torch.optim.Optimizer]:
    model, batch, optimizer = litgpt_models.built(point.row)
    is_lora = point.row["method"] == "LoRA"
    return model, batch, Loss(partial(litgpt_models.outputs, lora=is_lora), litgpt_models.loss), optimizer


def _syssim(point: Point) -> tuple[nn.Module, Any, Callable[..., Any], None]:
    parallel = point.row["parallel"]
    tensor, data = (int(found[1]) if (found := re.search(rf"{mark}(\d+)", parallel)) else 1 for mark in ("TP", "DP"))
    recomputes = point.row["checkpointing"] == "recompute full"
    model, batch = megatron_models.rank_of(point.row["model"], tensor=tensor, data=data, recomputes=recomputes)
    return model, batch, lambda model, batch: model(*batch), None


def _torchtitan(point: Point) -> tuple[nn.Module, Any, Callable[..., Any], torch.optim.Optimizer]:
    model, batch, optimizer = torchtitan_models.built(point.batch_size, int(point.row["seq"]), point.processes)
    return model, batch, torchtitan_models.loss, optimizer


_OF_ITS_OWN: dict[str, Callable[[Point], tuple[nn.Module, Any, Callable[..., Any], torch.optim.Optimizer | None]]] = {
    "litgpt": _litgpt,
    "syssim": _syssim,
    "torchtitan": _torchtitan,
}

#: Names that timm has changed since.
_TIMM_NAMES = {"convnext_base_384_in22ft1k": "convnext_base.fb_in22k_ft_in1k_384"}


def _language(name: str) -> nn.Module:
    import transformers

    if transformers.__version__ != TRANSFORMERS:
        raise UnsupportedInput(
            f"transformers {transformers.__version__} is here; what was measured is {TRANSFORMERS}, whose models "
            f"hold other tensors. Run this with a Python that has it: pip install transformers=={TRANSFORMERS}"
        )
    kind, settings = _LANGUAGE[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config)
    return model
