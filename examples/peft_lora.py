"""A Llama with LoRA adapters by PEFT, as it is and inside a budget: more tokens, adapters, training, the merge.

python examples/peft_lora.py [--budget 7MiB]     needs: pip install transformers peft
"""

from __future__ import annotations

from typing import Any

import torch
from comparison import compare
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit

DATA = torch.randint(0, 256, (6, 4, 96))


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the loss."""
    return model(input_ids=tokens, labels=tokens).loss


def train(budget: str | None) -> torch.nn.Module:
    """Three epochs with evaluation after each; the only difference is how the loss is called."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.resize_token_embeddings(260)
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss, applied = loss_of, None
    if budget is not None:
        applied = tightfit.fit(model, DATA[0], budget=budget, loss=loss_of, optimizer=optimizer)
        loss = applied.loss
    for _ in range(3):
        model.train()
        for tokens in DATA:
            loss(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            loss_of(model, DATA[0])
    if applied is not None:
        applied.remove()
    return model.merge_and_unload()


if __name__ == "__main__":
    compare(train, budget="7MiB")
