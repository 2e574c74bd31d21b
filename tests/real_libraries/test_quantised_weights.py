"""Frozen weights of bitsandbytes and torchao, with adapters that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.real_libraries.models import Block, LowRank, mean_square, stack
from tests.real_libraries.trainings import five_steps

# The libraries' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_qlora_by_bitsandbytes_and_peft() -> None:
    import bitsandbytes
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and name != "lm_head":
                    yield module, name, child

    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
        for module, name, linear in linears(model):
            inside, outside = linear.in_features, linear.out_features
            four_bits: Any = bitsandbytes.nn.Linear4bit(inside, outside, bias=False, quant_type="nf4")
            four_bits.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            setattr(module, name, four_bits.to("cpu"))
        lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        return lora, torch.randint(0, 128, (4, 32))

    peaks = five_steps(
        make,
        lambda model, ids: model(input_ids=ids, labels=ids).loss,
        lambda model: model.base_model.model.model.layers,  # type: ignore[attr-defined, union-attr]  # a LlamaModel's
    )
    assert peaks.replayed_ops > 0
    assert peaks.smallest <= peaks.checkpointed < peaks.plain


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_with_adapters(config: str) -> None:
    from torchao import quantization

    def make() -> tuple[nn.Module, Tensor]:
        model, batch = stack(Block)
        quantization.quantize_(model.requires_grad_(False), getattr(quantization, config)())
        for block in model:
            block.qkv, block.up, block.down = LowRank(block.qkv), LowRank(block.up), LowRank(block.down)
        return model, batch

    peaks = five_steps(make, mean_square, lambda model: model)
    assert peaks.replayed_ops > 0
    assert peaks.smallest <= peaks.checkpointed < peaks.plain
