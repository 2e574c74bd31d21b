"""The models: one of each family, sized so that a step takes some 0.3 s on one core and activations are most of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.suite.vision import Residual, UNet
from tightfit.train.models.gpt import Gpt, GptConfig

Loss = Callable[[nn.Module, Any], torch.Tensor]

_CLASSES = 100


@dataclass(frozen=True)
class Family:
    """A model ready to train, and what people checkpoint in it."""

    model: nn.Module
    batch: Any
    blocks: tuple[str, ...]
    """Module paths of its layers, in order."""
    loss: Loss | None = None


def _paths(model: nn.Module, kinds: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(name for name, module in model.named_modules() if type(module).__name__ in kinds)
    assert found, kinds
    return found


def _next_token_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _class_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _mask_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


def _pictures(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 64, 64), "labels": torch.randint(0, _CLASSES, (count,))}


def gpt() -> Family:
    """Dropout, fused attention, tied embeddings."""
    model = Gpt(GptConfig(vocabulary_size=512, sequence_length=192, width=192, layers=8, heads=6, dropout=0.1))
    return Family(model, torch.randint(0, 512, (4, 193)), _paths(model, ("Block",)), _next_token_loss)


def llama() -> Family:
    """Grouped-query attention, rotary positions, RMS norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=256, use_cache=False,
        )
    )  # fmt: skip
    tokens = torch.randint(0, 512, (4, 256))
    return Family(model, {"input_ids": tokens, "labels": tokens}, _paths(model, ("LlamaDecoderLayer",)))


def bert() -> Family:
    """Masked language model with dropout."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(
            vocab_size=512, hidden_size=192, num_hidden_layers=8, num_attention_heads=6, intermediate_size=768,
            max_position_embeddings=256,
        )
    )  # fmt: skip
    tokens = torch.randint(0, 512, (8, 128))
    return Family(model, {"input_ids": tokens, "labels": tokens.clone()}, _paths(model, ("BertLayer",)))


def t5() -> Family:
    """Encoder and decoder, attention with relative positions, dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=512, d_model=192, d_kv=32, d_ff=512, num_layers=4, num_heads=6, decoder_start_token_id=0,
            use_cache=False,
        )
    )  # fmt: skip
    source, target = torch.randint(3, 512, (4, 160)), torch.randint(3, 512, (4, 128))
    return Family(model, {"input_ids": source, "labels": target}, _paths(model, ("T5Block",)))


def vit() -> Family:
    """Vision transformer with dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(
        ViTConfig(
            image_size=64, patch_size=8, hidden_size=192, num_hidden_layers=8, num_attention_heads=6,
            intermediate_size=768, hidden_dropout_prob=0.1, num_labels=_CLASSES,
        )
    )  # fmt: skip
    return Family(model, _pictures(16), _paths(model, ("ViTLayer",)))


def swin() -> Family:
    """Shifted windows, relative position bias, stochastic depth."""
    from transformers import SwinConfig, SwinForImageClassification

    model = SwinForImageClassification(
        SwinConfig(
            image_size=64, patch_size=2, embed_dim=48, depths=[2, 2, 4], num_heads=[2, 4, 8], window_size=8,
            num_labels=_CLASSES,
        )
    )  # fmt: skip
    return Family(model, _pictures(12), _paths(model, ("SwinLayer",)))


def convnext() -> Family:
    """Depthwise convolutions, layer norm over channels, stochastic depth."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    model = ConvNextForImageClassification(
        ConvNextConfig(
            image_size=64, patch_size=2, num_stages=3, hidden_sizes=[48, 96, 192], depths=[2, 2, 4],
            drop_path_rate=0.1, num_labels=_CLASSES,
        )
    )  # fmt: skip
    return Family(model, _pictures(16), _paths(model, ("ConvNextLayer",)))


def resnet() -> Family:
    """Batch norm and in-place ReLU, as in torchvision's basic blocks."""
    width = 32
    layers: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    ]
    inputs = width
    for stage in range(3):
        for block in range(3):
            layers.append(Residual(inputs, width << stage, 2 if stage and not block else 1))
            inputs = width << stage
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, _CLASSES))
    batch = (torch.randn(16, 3, 48, 48), torch.randint(0, _CLASSES, (16,)))
    return Family(model, batch, _paths(model, ("Residual",)), _class_loss)


def unet() -> Family:
    """Activations that live across the whole network; group norm."""
    model = UNet(24, 4)
    batch = (torch.randn(8, 3, 96, 96), (torch.rand(8, 1, 96, 96) > 0.5).float())
    return Family(model, batch, _paths(model, ("DoubleConv",)), _mask_loss)


FAMILIES: dict[str, Callable[[], Family]] = {
    "gpt": gpt,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "resnet": resnet,
    "unet": unet,
}


#: Those that Hugging Face's own switch works on.
TRANSFORMERS = frozenset({"llama", "bert", "t5", "vit", "swin", "convnext"})


def build(name: str) -> Family:
    """The named model, training, with the same weights and batch at every call."""
    torch.manual_seed(0)
    family = FAMILIES[name]()
    family.model.train()
    return family
