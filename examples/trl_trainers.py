"""A small Llama trained by TRL, as it is and inside a budget: supervised, by preferences, and by rewards.

python examples/trl_trainers.py [sft|dpo|grpo] [--budget 60MiB]     needs: pip install trl
"""

from __future__ import annotations

import copy
import sys
import tempfile
from typing import Any

import torch
from comparison import compare
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tightfit.integrations.transformers import TightfitCallback

WORDS = [f"w{number}" for number in range(1020)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, made here: nothing is downloaded."""
    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model() -> LlamaForCausalLM:
    """Return a language model."""
    config = LlamaConfig(
        vocab_size=1023, hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        attention_dropout=0.1, attn_implementation="eager", pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def text(number: int, length: int) -> str:
    """Return some text."""
    return " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(length))


def common(folder: str) -> dict[str, Any]:
    """Return the arguments that all three share: three epochs with evaluation."""
    return {
        "output_dir": folder, "per_device_train_batch_size": 4, "num_train_epochs": 3, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "bf16": False, "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "epoch", "per_device_eval_batch_size": 4, "gradient_checkpointing": False,
    }  # fmt: skip


def sft(folder: str) -> Any:
    """Return a trainer on texts."""
    data = Dataset.from_list([{"text": text(number, 64)} for number in range(8)])
    arguments = SFTConfig(max_length=64, **common(folder))
    return SFTTrainer(model(), arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def dpo(folder: str) -> Any:
    """Return a trainer on pairs of texts, of which the first is preferred."""
    data = Dataset.from_list(
        [
            {"prompt": text(number, 8), "chosen": text(number + 1, 24), "rejected": text(number + 2, 24)}
            for number in range(8)
        ]
    )
    arguments = DPOConfig(max_length=128, **common(folder))
    trained = model()
    return DPOTrainer(
        trained, copy.deepcopy(trained), arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )


def grpo(folder: str) -> Any:
    """Return a trainer that writes texts itself, and is rewarded for them."""
    data = Dataset.from_list([{"prompt": text(number, 56)} for number in range(4)])
    arguments = GRPOConfig(
        num_generations=4, max_completion_length=8, generation_kwargs={"min_new_tokens": 8},
        **common(folder),
    )  # fmt: skip
    return GRPOTrainer(model(), reward, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def reward(completions: list[str], **_: Any) -> list[float]:
    """Reward different words."""
    return [float(len(set(each.split()))) for each in completions]


def train(budget: str | None) -> torch.nn.Module:
    """Train; the only difference is one line."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = KINDS[KIND](folder)
        if budget is not None:
            trainer.add_callback(TightfitCallback(budget=budget))
        trainer.train()
    return trainer.model


KINDS = {"sft": sft, "dpo": dpo, "grpo": grpo}
KIND = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in KINDS else "sft"

if __name__ == "__main__":
    compare(train, budget="60MiB")
