"""An encoder of sentences trained by sentence-transformers, as it is and inside a budget: memory, time, bits.

python examples/sentence_transformers_trainer.py [--budget 20MiB]     needs: pip install sentence-transformers
"""

from __future__ import annotations

import tempfile

import torch
from comparison import compare
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tightfit.integrations.transformers import TightfitCallback

WORDS = [f"w{number}" for number in range(1000)]


def encoder(folder: str) -> SentenceTransformer:
    """Return a small BERT with mean pooling, made here: nothing is downloaded."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(names), hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(folder, max_seq_length=64)
    return SentenceTransformer(modules=[transformer, Pooling(64)], device="cpu")


def sentence(number: int) -> str:
    """Return some text."""
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(48))


def train(budget: str | None) -> torch.nn.Module:
    """Three epochs with evaluation after each; the only difference is one line."""
    data = Dataset.from_list([{"anchor": sentence(number), "positive": sentence(number + 1)} for number in range(32)])
    with tempfile.TemporaryDirectory() as folder:
        model = encoder(folder)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=3,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", eval_strategy="epoch",
            logging_strategy="no",
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=data, eval_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
        )
        if budget is not None:
            trainer.add_callback(TightfitCallback(budget=budget))
        trainer.train()
    return model


if __name__ == "__main__":
    compare(train, budget="20MiB")
