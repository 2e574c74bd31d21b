"""Change what forward changes (a KV cache, an attribute, a counter) once, as without a plan.

See https://github.com/pytorch/pytorch/issues/155171 and https://github.com/huggingface/transformers/issues/28056.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tightfit
from tests.promises.training import adamw, same_training

TOKENS = [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        use_cache=True,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def gpt2(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, use_cache=True)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_model_with_use_cache_trains(build: Any) -> None:
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = build(transformers).train()
        return model

    lengths: list[int] = []

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        out = model(input_ids=tokens, labels=tokens, use_cache=True)
        lengths.append(out.past_key_values.get_seq_length())
        loss: Tensor = out.loss
        return loss

    same_training(make, TOKENS, loss_of)
    assert set(lengths) == {16}, "the cache holds each position once"


def test_a_cache_that_the_caller_fills_and_goes_on_with() -> None:
    """The second half of a text is trained on keys and values that the first half left in the cache."""
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        torch.manual_seed(0)
        return llama(transformers).train()

    lengths: list[int] = []

    def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
        cache = transformers.DynamicCache()
        first = model(input_ids=tokens[:, :8], labels=tokens[:, :8], past_key_values=cache, use_cache=True)
        second = model(input_ids=tokens[:, 8:], labels=tokens[:, 8:], past_key_values=cache, use_cache=True)
        lengths.append(cache.get_seq_length())
        loss: Tensor = first.loss + second.loss
        return loss

    same_training(make, TOKENS, loss_of)
    assert set(lengths) == {16}


class Stateful(nn.Module):
    """Counts its calls, keeps a log, caches a mask, and writes a running maximum and a ring of past features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)
        self.register_buffer("largest", torch.zeros(48))
        self.register_buffer("ring", torch.zeros(4, 48))
        self.register_buffer("calls_seen", torch.zeros((), dtype=torch.int64))
        self.calls = 0
        self.log: list[tuple[int, ...]] = []
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.mask: Tensor | None = None
        self.scale = torch.ones(48)  # a plain attribute that is written in place

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.tril(torch.ones(x.shape[1], x.shape[1])) / x.shape[1]
        self.calls += 1
        self.log.append(tuple(x.shape))
        self.shapes[tuple(x.shape)] += 1
        hidden = torch.tanh(self.mask @ self.first(x)) * self.scale.clone()
        with torch.no_grad():
            self.calls_seen += 1
            self.largest.copy_(torch.maximum(self.largest, hidden.abs().amax((0, 1))))
            self.ring[self.calls % 4] = hidden.mean((0, 1))
            self.scale.mul_(0.99)
        return self.second(torch.sigmoid(hidden) * (1 + self.largest.clone())).pow(2).mean()


BATCHES = [torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_attributes_buffers_and_counters_are_those_of_plain_training() -> None:
    trained = same_training(Stateful, BATCHES)
    plain, planned = trained.plain, trained.planned
    assert isinstance(plain, Stateful)
    assert isinstance(planned, Stateful)
    # `fit` itself ran the model several times; of that nothing is left.
    assert planned.calls == plain.calls == planned.calls_seen == len(BATCHES)
    assert planned.log == plain.log == [(4, 8, 32)] * len(BATCHES)
    assert planned.shapes == plain.shapes
    assert torch.equal(planned.scale, plain.scale)
    assert torch.equal(planned.ring, plain.ring)
    assert type(planned.mask) is Tensor
    assert torch.equal(planned.mask, plain.mask)


def test_fit_alone_leaves_no_trace() -> None:
    model = Stateful()
    with tightfit.fit(model, BATCHES[0], optimizer=adamw(model), grad_checkpoint="full"):
        assert (model.calls, model.log, model.shapes, model.mask) == (0, [], Counter(), None)
        assert torch.equal(model.scale, torch.ones(48))
        assert not model.ring.any()


def test_the_bug_is_real_checkpointing_counts_twice() -> None:
    model = Stateful()
    checkpoint(model, BATCHES[0], use_reentrant=False).backward()
    assert model.calls == 2
