"""A small Llama that the `Trainer` of transformers trains, on samples that draw random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset, IterableDataset

from tightfit.integrations.transformers import TightfitCallback

BUDGET = 2_200_000


class Tokens(Dataset[Any]):
    """Samples of one length, or of three; each draws from the global generator, as augmentation does."""

    def __init__(self, lengths: tuple[int, ...] = (32,)) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return 16

    def __getitem__(self, number: int) -> Mapping[str, torch.Tensor]:
        if number >= len(self):
            raise IndexError(number)
        random.random()
        ids = torch.randint(0, 256, (self._lengths[number % len(self._lengths)],))
        return {"input_ids": ids, "labels": ids.clone()}


class Stream(IterableDataset[Any]):
    """Samples without numbers."""

    def __iter__(self) -> Any:
        yield from (Tokens()[number] for number in range(16))


def padded(rows: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, attention_dropout=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trained(
    callback: TightfitCallback | None,
    data: Any,
    change: Callable[[Any], None] = lambda _: None,
    resume: str | None = None,
    **options: Any,
) -> Any:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    arguments = transformers.TrainingArguments(
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        **{"output_dir": "out", "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "no",
           "per_device_train_batch_size": 4, **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        model(), arguments, train_dataset=data, eval_dataset=Tokens(), data_collator=padded,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    change(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
