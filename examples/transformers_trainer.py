"""A Llama trained by the `Trainer` of transformers, as it is and inside a budget: memory, time, bits.

python examples/transformers_trainer.py [--budget 50MiB]     needs: pip install transformers accelerate
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from comparison import compare
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tightfit.integrations.transformers import TightfitCallback

DATA = TensorDataset(torch.randint(0, 256, (32, 128)))


def rows_to_batch(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Return a batch as the model takes it."""
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def train(budget: str | None) -> torch.nn.Module:
    """Three epochs, with evaluation and a checkpoint after each; the only difference is one line."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        attention_dropout=0.1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3,
            eval_strategy="epoch", save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
            logging_strategy="no", label_smoothing_factor=0.1,
        )  # fmt: skip
        trainer = Trainer(
            LlamaForCausalLM(config), arguments, train_dataset=DATA, eval_dataset=DATA, data_collator=rows_to_batch
        )
        if budget is not None:
            trainer.add_callback(TightfitCallback(budget=budget))
        trainer.train()
    return trainer.model


if __name__ == "__main__":
    compare(train, budget="18MiB")
