"""A fine-tune with transformers' Trainer, from a configuration."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config)
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(256, (64,), generator=generator) for _ in range(64)]
dataset = [{"input_ids": row, "labels": row} for row in rows]
arguments = TrainingArguments(
    output_dir=sys.argv[1], per_device_train_batch_size=8, max_steps=4, use_cpu=True, report_to=[], save_strategy="no",
    logging_steps=1, disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
trainer.train()
