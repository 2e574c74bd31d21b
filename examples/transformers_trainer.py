"""A Llama trained by the `Trainer` of transformers, as it is and inside a budget: memory, time, bits.

python examples/transformers_trainer.py [--budget 50MiB]     needs: pip install transformers accelerate
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from tightfit.device import memory as meter
from tightfit.integrations.transformers import TightfitCallback


class MeteredTrainer(Trainer):
    """Measures the peak of one step, by another meter than the one that planned it."""

    peak_bytes = 0

    def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
        """Take a step, under the meter if it is the fourth."""

        def step() -> Any:
            return super(MeteredTrainer, self).training_step(model, inputs, *more)

        if self.state.global_step != 3:
            return step()
        resident = meter.resident_bytes(model, inputs, self.optimizer.optimizer)
        loss, self.peak_bytes = meter.measure_peak(step, resident)
        return loss


def train(budget: str | None) -> tuple[MeteredTrainer, float]:
    """One epoch; the only difference is one line."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        attention_dropout=0.1,
    )  # fmt: skip
    data = TensorDataset(torch.randint(0, 256, (64, 128)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=8, num_train_epochs=1, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = MeteredTrainer(
            LlamaForCausalLM(config), arguments, train_dataset=data,
            data_collator=lambda rows: {"input_ids": (ids := torch.stack([row[0] for row in rows])), "labels": ids},
        )  # fmt: skip
        if budget is not None:
            trainer.add_callback(TightfitCallback(budget=budget))
        begin = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - begin


def main() -> None:
    """Train twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="50MiB")
    budget = parser.parse_args().budget
    (plain, plain_s), (planned, planned_s) = train(None), train(budget)
    weights = zip(plain.model.parameters(), planned.model.parameters(), strict=True)
    print(f"plain    peak {plain.peak_bytes / 2**20:.1f} MiB, {plain_s:.1f} s")
    print(f"tightfit peak {planned.peak_bytes / 2**20:.1f} MiB of {budget}, {planned_s:.1f} s, planning included")
    print(f"weights  {'equal, bit for bit' if all(torch.equal(a, b) for a, b in weights) else 'DIFFER'}")


if __name__ == "__main__":
    main()
