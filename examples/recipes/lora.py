"""Fine-tune a local folder of the transformers library by LoRA (peft), inside a memory budget.

    python -m examples.recipes.lora --folder my-model --text my-texts.txt --memory 8GiB
    python -m examples.recipes.lora          # to try it: a small Llama with random weights, on the standard library

Run it from the repository's root.  Texts become tokens by the folder's own tokenizer, and bytes where it has none.  The
adapter is written to --output, and says at the end what it changed and in how much memory.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tightfit

EXAMPLE = Path(__file__).parent.parent / "llama-bytes"


def load(folder: Path | None) -> PreTrainedModel:
    """Load the folder's model; without one, make the example's with random weights."""
    if folder is None:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EXAMPLE))
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def tokens_of(text: str, folder: Path | None) -> Tensor:
    """Return the text's token numbers."""
    if folder is not None and ((folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, return_tensors="pt").input_ids[0]
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def main(words: list[str] | None = None) -> int:
    """Fine-tune, and compare the loss on held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of a causal language model; without it, a random one")
    parser.add_argument("--text", type=Path, help="text file; without it, a module of the standard library")
    parser.add_argument("--memory", default="45MiB", help="budget of a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, default=Path("runs/recipes/lora"))
    options = parser.parse_args(words)
    for path, is_there in ((options.folder, Path.is_dir), (options.text, Path.is_file)):
        if path is not None and not is_there(path):
            parser.error(f"there is no {path}")

    torch.manual_seed(0)
    text_file = options.text or Path(sysconfig.get_paths()["stdlib"]) / "typing.py"
    tokens = tokens_of(text_file.read_text(encoding="utf-8"), options.folder)
    samples = tokens[: len(tokens) // options.sequence * options.sequence].view(-1, options.sequence)
    held = max(1, len(samples) // 10)
    samples, held_out = samples[:-held], samples[-held:][: options.batch_size]
    if len(samples) < options.batch_size:
        parser.error(f"{text_file} gives {len(samples)} samples, fewer than one batch. Give more text, or --sequence")

    adapters = LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(options.folder), adapters)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.lr)

    def batch_of(rows: Tensor) -> dict[str, Tensor]:
        return {"input_ids": rows, "labels": rows}

    def held_out_loss() -> float:
        model.eval()
        with torch.no_grad():
            loss = model(**batch_of(held_out)).loss
        model.train()
        return float(loss)

    before = held_out_loss()
    first = batch_of(samples[: options.batch_size])
    free_bytes = tightfit.Budget.of("auto", torch.device("cpu")).total_bytes  # what the plain step may take, to compare
    with tightfit.fit(
        model, first, budget=options.memory, optimizer=optimizer, reference_budget_bytes=free_bytes
    ) as applied:
        verdict = applied.verdict
        for _ in range(options.steps):
            rows = samples[torch.randperm(len(samples))[: options.batch_size]]
            optimizer.zero_grad()
            applied.loss(model, batch_of(rows)).backward()
            optimizer.step()
    after = held_out_loss()
    model.save_pretrained(options.output)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    print(f"adapters  {trained:,} of {whole:,} parameters, in {options.output}")
    print(
        f"memory    peak {verdict.measured_peak_bytes / 2**20:.1f} MiB of {options.memory}, plain "
        f"{verdict.plain_peak_bytes / 2**20:.1f} MiB; gradients "
        f"{'equal, bit for bit' if verdict.gradients_equal else 'NOT proven equal'}"
    )
    print(f"held out  loss {before:.3f} before, {after:.3f} after {options.steps} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
