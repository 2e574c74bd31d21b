"""What litgpt fine-tunes: its own models, in bf16, as its scripts ``finetune/full.py`` and ``finetune/lora.py`` do.

A batch is as long as the longest that its settings allow: 512 tokens, which Alpaca's longest samples reach.  Fabric,
the loop that these scripts run in, gives outputs in fp32 of models that compute in bf16.  Validation and the
generation of an example, which are within what was measured, are not asked for: neither keeps what a backward needs.

On several GPUs the scripts shard with FSDP1 block by block, and checkpoint each block; here that is FSDP2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from tightfit.step.weightless import without_weights

#: litgpt's name of each model of the table.
NAMES = {
    "tiny-llama": "tiny-llama-1.1b",
    "phi-2": "phi-2",
    "phi-3": "Phi-3-mini-4k-instruct",
    "stablelm-base-alpha-3b": "stablelm-base-alpha-3b",
    "llama-3.1-8b": "Llama-3.1-8B",
    "mistral-7b-v0.2": "Mistral-7B-v0.2",
    "mistral-7b": "Mistral-7B-v0.1",
    "llama-2-7b": "Llama-2-7b-hf",
    "gemma-2b": "Gemma-2b",
    "falcon-7b": "falcon-7b",
}
#: What a table's ``lora_targets`` names, as settings of the model.
_TARGETS = {"q": "query", "k": "key", "v": "value", "proj": "projection", "mlp": "mlp", "head": "head"}
_LR = 2e-4
#: Rows of the logits that lora.py makes at a time.
_LORA_CHUNK = 128


def built(row: Mapping[str, str]) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """Return the model of a row of litgpt.csv, a batch of token numbers and targets, and the optimizer."""
    name = NAMES[row["model"].partition(" (")[0]]
    with without_weights(), _default_dtype(torch.bfloat16):
        model = _lora(name, row) if row["method"] == "LoRA" else _full(name)
        model.max_seq_length = int(row["max_seq_length"])
    if (shards := shards_of(row)) > 1:
        _shard(model, shards)
    model.train()
    tokens = torch.empty(int(row["micro_batch"]), int(row["max_seq_length"]), dtype=torch.long, device="meta")
    return model, (tokens, torch.empty_like(tokens)), torch.optim.AdamW(model.parameters(), lr=_LR)


def shards_of(row: Mapping[str, str]) -> int:
    """Return over how many GPUs a row's model is sharded."""
    return int(row["devices"].split(" ")[0])


def outputs(model: nn.Module, batch: Any, *, lora: bool) -> Any:
    """Call a model as the scripts do, within Fabric."""
    logits = model(batch[0], lm_head_chunk_size=_LORA_CHUNK) if lora else model(batch[0])
    if not lora:
        return logits.float()
    logits = [part.float() for part in logits]
    logits[-1] = logits[-1][..., :-1, :]
    return logits


def loss(logits: Any, batch: Any) -> torch.Tensor:
    """Return the loss of what `outputs` returned."""
    from litgpt.utils import chunked_cross_entropy

    if isinstance(logits, torch.Tensor):
        logits = logits[..., :-1, :]
    found: torch.Tensor = chunked_cross_entropy(logits, batch[1][..., 1:])
    return found


class Recomputed(nn.Module):
    """A block that is checkpointed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        """Run the block, and again in backward."""
        return checkpoint(self.block, *args, use_reentrant=False)


def _full(name: str) -> Any:
    from litgpt.model import GPT, Config

    return GPT(Config.from_name(name))


def _lora(name: str, row: Mapping[str, str]) -> Any:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    targets = {f"lora_{_TARGETS[one]}": True for one in row["lora_targets"].split(",")}
    config = Config.from_name(
        name,
        lora_r=int(row["lora_r"]),
        lora_alpha=int(row["lora_alpha"]),
        lora_dropout=float(row["lora_dropout"]),
        **targets,
    )
    model = GPT(config)
    mark_only_lora_as_trainable(model)
    return model


def _shard(model: Any, shards: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (shards,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    blocks = model.transformer.h
    for place, block in enumerate(blocks):
        blocks[place] = Recomputed(block)
        fully_shard(blocks[place], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class _default_dtype:  # noqa: N801  # a context manager, named as what it does
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before)
