"""A small Llama with weights that do not train, and adapters beside them, by peft, bitsandbytes and torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.subject import Subject

VOCABULARY, TOKENS, ROWS = 320, 64, 4
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(family: str, name: str) -> Subject:
    """`name`: what holds the frozen weights, a dash, and the kind of adapter."""
    base, _, adapter = name.partition("-")
    model = _adapted(_BASES[base](_llama()), adapter)
    tokens = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    return Subject.single(model, {"input_ids": tokens, "labels": tokens}, lambda model, batch: model(**batch).loss)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _adapted(model: nn.Module, adapter: str) -> nn.Module:
    import peft

    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=_ALL, **common),
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=_ALL, **common),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **common
        ),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=_ALL, **common),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=_ALL, **common),
        "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=_ALL, **common),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], **common),
        "oft": lambda: peft.OFTConfig(oft_block_size=16, target_modules=_ALL, **common),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"], **common),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **common),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **common),
    }
    found: nn.Module = peft.get_peft_model(model, configs[adapter]())
    return found.train()


def _four_bits(model: nn.Module) -> nn.Module:
    import bitsandbytes

    for path, linear in [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear)]:
        if path == "lm_head":
            continue
        replaced = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        replaced.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        _replace(model, path, replaced.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def _eight_bits(model: nn.Module) -> nn.Module:
    import bitsandbytes

    for path, linear in [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Linear)]:
        if path == "lm_head":
            continue
        replaced = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        replaced.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        _replace(model, path, replaced.to("cpu"))
    model.is_loaded_in_8bit = True
    return model


def _replace(model: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)


def _torchao(kind: str) -> Any:
    def quantise(model: nn.Module) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(model.model.layers, getattr(quantization, kind)())  # type: ignore[union-attr]  # transformers' own
        return model

    return quantise


_BASES: dict[str, Any] = {
    "full": lambda model: model,
    "nf4": _four_bits,
    "int8": _eight_bits,
    "torchao8": _torchao("Int8WeightOnlyConfig"),
}
