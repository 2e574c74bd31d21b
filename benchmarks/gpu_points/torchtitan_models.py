"""What torchtitan trained at the end of 2024: Llama 3.1 8B, sharded by FSDP2, with some operations' results kept.

``torchtitan/models/llama/model.py``, ``parallelisms/parallelize_llama.py`` and ``train.py`` of github
pytorch/torchtitan @ba24697 say how: weights in fp32 and gathered in bf16, gradients reduced in fp32, attention's and
every other matrix product's results kept while all else of a block is computed again, the whole output cast to fp32
for its loss, AdamW over all tensors at once, and growing segments (``run_llama_train.sh``).  Its RMSNorm computes in
fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tightfit.step.weightless import without_weights

#: ``PYTORCH_CUDA_ALLOC_CONF`` of its script.
ALLOCATOR = "expandable_segments:True"
_LAYERS, _WIDTH, _HEADS, _GROUPS, _INNER, _VOCABULARY = 32, 4096, 32, 8, 14336, 128256
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
)


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(_WIDTH))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        wide = value.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return wide.type_as(value) * self.weight


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = _WIDTH // _HEADS
        self.query = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.key = nn.Linear(_WIDTH, _GROUPS * head, bias=False)
        self.value = nn.Linear(_WIDTH, _GROUPS * head, bias=False)
        self.outward = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.gate = nn.Linear(_WIDTH, _INNER, bias=False)
        self.down = nn.Linear(_INNER, _WIDTH, bias=False)
        self.up = nn.Linear(_WIDTH, _INNER, bias=False)
        self.before_attention, self.before_mlp = _Norm(), _Norm()

    def forward(self, value: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        value = value + self._attention(self.before_attention(value), turns)
        return value + self._mlp(self.before_mlp(value))

    def _mlp(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(F.silu(self.gate(value)) * self.up(value))
        return found

    def _attention(self, value: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        batch, length, _ = value.shape
        query, key, given = self.query(value), self.key(value), self.value(value)
        head = _WIDTH // _HEADS
        query, key, given = (part.view(batch, length, -1, head) for part in (query, key, given))
        query, key = _turned(query, turns), _turned(key, turns)
        key, given = _repeated(key), _repeated(given)
        query, key, given = (part.transpose(1, 2) for part in (query, key, given))
        output = F.scaled_dot_product_attention(query, key, given, is_causal=True)
        output = output.transpose(1, 2).contiguous().view(batch, length, -1)
        found: torch.Tensor = self.outward(output)
        return found


def _turned(value: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(value.float().reshape(*value.shape[:-1], -1, 2))
    turned = pairs * turns.view(1, value.shape[1], 1, -1)
    return torch.view_as_real(turned).flatten(3).type_as(value)


def _repeated(value: torch.Tensor) -> torch.Tensor:
    batch, length, groups, head = value.shape
    times = _HEADS // _GROUPS
    return value.unsqueeze(3).expand(batch, length, groups, times, head).reshape(batch, length, groups * times, head)


class _Kept(nn.Module):
    """A block of which some operations' results are kept, and the others computed again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> Any:
    products = {True: 0, False: 0}

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        keeps = operator in _KEPT
        if operator is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            keeps = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Llama(nn.Module):
    """The model."""

    turns: torch.Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, _WIDTH)
        self.blocks = nn.ModuleList(_Kept(_Block()) for _ in range(_LAYERS))
        self.norm = _Norm()
        self.output = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        turns = torch.empty(length, _WIDTH // _HEADS // 2, dtype=torch.complex64, device="meta")
        self.register_buffer("turns", turns)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        value = self.words(tokens)
        for block in self.blocks:
            value = block(value, self.turns)
        found: torch.Tensor = self.output(self.norm(value))
        return found


def built(batch_size: int, length: int, shards: int) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """Return the sharded model, a batch, and the optimizer; in a process group of so many, see `pretended_group`."""
    from torch.distributed.device_mesh import init_device_mesh

    with without_weights():
        model = Llama(length)
    mesh = init_device_mesh("cpu", (shards,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for number, block in enumerate(model.blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=number < _LAYERS - 1)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    tokens = torch.empty(batch_size, length, dtype=torch.long, device="meta")
    return model.train(), (tokens, torch.empty_like(tokens)), torch.optim.AdamW(model.parameters(), lr=3e-4)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss; the logits have no name left when backward begins."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1).float(), batch[1].flatten(0, 1))
