"""The engine on CUDA: Philox, cuDNN, the caching allocator's reserved bytes.

Run by `make gpu-check` on a GPU. `make test-cuda` runs them on emulated devices, where every tensor reads as zeros:
budgets, peaks, dispatch and generators are then proven, bits are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.device import device_for
from tightfit.device.memory import resident_bytes
from tightfit.solver.solver import full_plan, plain_plan

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
# PyTorch looks once, before cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
MIB = 2**20


class Mixer(nn.Module):
    """Attention and MLP with dropout: random masks from the GPU's generator."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(6)
        )
        self.head = nn.Linear(width, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ConvNet(nn.Module):
    """BatchNorm in train mode and in-place ReLU, through cuDNN."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
                nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
            )
            for a, b in pairwise(widths)
        )  # fmt: skip
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Recurrent(nn.Module):
    """cuDNN's LSTM, which is kept, and what surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.lstm = nn.LSTM(128, 256, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(x))[0])


def mse(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]).float(), batch[1])


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())


def transformers_model(name: str) -> tuple[nn.Module, Any, Callable[..., torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 512, (8, 256), device="cuda")
    if name == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=4, hidden_size=256, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=704, vocab_size=512, use_cache=False,
        )  # fmt: skip
        model: nn.Module = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            n_layer=4, n_embd=256, n_head=4, vocab_size=512, n_positions=256, use_cache=False
        )
        model = transformers.GPT2LMHeadModel(config)
    return model.train(), tokens, lambda m, b: m(input_ids=b, labels=b).loss


def make(name: str) -> tuple[nn.Module, Any, Callable[..., torch.Tensor]]:
    torch.manual_seed(0)
    if name == "mixer":
        batch: Any = (torch.randn(32, 128, 256, device="cuda"), torch.randn(32, 128, 64, device="cuda"))
        return Mixer().to("cuda"), batch, mse
    if name == "convnet":
        batch = (torch.randn(64, 3, 64, 64, device="cuda"), torch.randint(0, 10, (64,), device="cuda"))
        return ConvNet().to("cuda"), batch, cross_entropy
    if name == "recurrent":
        tokens = torch.randint(0, 64, (64, 129), device="cuda")
        return Recurrent().to("cuda"), (tokens[:, :-1], tokens[:, 1:]), cross_entropy
    model, batch, loss = transformers_model(name)
    return model.to("cuda"), batch, loss


@pytest.fixture(autouse=True)
def deterministic_algorithms() -> Any:
    # Plain must equal itself: what it does not reproduce, the proof leaves out of the comparison.
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)  # put back by `tests/conftest.py`
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("name", ["mixer", "convnet", "recurrent", "llama", "gpt2"])
def test_three_budgets_bit_for_bit(name: str, autocast: torch.dtype | None, record_property: Any) -> None:
    model, batch, loss = make(name)
    optimizer = torch.optim.AdamW(model.parameters())
    whole = device_for("cuda").capacity_bytes()
    free = tightfit.fit(model, batch, loss=loss, optimizer=optimizer, autocast=autocast, reference_budget_bytes=whole)
    free.remove()  # it would go on planning for batches of other shapes
    assert free.plan.is_plain
    assert not free.installed
    assert free.profile is not None
    assert free.verdict is not None
    assert free.verdict.ok, free.verdict
    offset = free.verdict.measured_peak_bytes - free.plan.predicted_peak_bytes
    smallest = full_plan(free.profile, whole).predicted_peak_bytes
    largest = plain_plan(free.profile, whole).predicted_peak_bytes
    measured = free.verdict.measured_peak_bytes
    print(
        f"\n{name} {autocast}: plain predicted {largest / MIB:.1f}, measured {measured / MIB:.1f} (reserved + process)"
    )
    for share in (0.75, 0.5, 0.25):
        # The context and the libraries count: budgets are set above what this process holds besides tensors.
        budget = int(smallest + share * (largest - smallest)) + max(0, offset)
        applied = tightfit.fit(
            model, batch, budget=budget, loss=loss, optimizer=optimizer, autocast=autocast,
            reference_budget_bytes=whole,
        )  # fmt: skip
        verdict = applied.verdict
        applied.remove()
        assert verdict is not None
        print(f"  budget {budget / MIB:.1f}: predicted {verdict.predicted_peak_bytes / MIB:.1f}, "
              f"measured {verdict.measured_peak_bytes / MIB:.1f}, replayed {verdict.replayed_ops}, "
              f"mismatches {verdict.mismatches}, overhead {verdict.overhead_ratio:+.2f}, "
              f"not reproducible {len(verdict.not_reproducible)}")  # fmt: skip
        assert verdict.measured_peak_bytes <= budget
        assert verdict.plain_reproducible, verdict.not_reproducible
        assert verdict.gradients_equal, verdict.differing
        assert verdict.loss_equal
        assert verdict.buffers_equal
        assert verdict.rng_equal
        assert verdict.mismatches == 0


def test_predicted_allocated_peak_is_the_allocators() -> None:
    model, batch, loss = make("mixer")
    profile = tightfit.measure(model, batch, loss=loss)
    assert profile.allocator is not None
    predicted = plain_plan(profile, 2**50).predicted_allocated_bytes - profile.allocator.beside_bytes
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated() - resident_bytes(model, batch)
        torch.cuda.reset_peak_memory_stats()
        loss(model, batch).backward()
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - base
    print(f"\nallocated: predicted {predicted / MIB:.2f} MiB, measured {measured / MIB:.2f} MiB")
    assert abs(predicted - measured) <= 0.03 * measured


def test_dropout_masks_are_the_same_and_the_generator_ends_where_plain_does() -> None:
    model, batch, loss = make("mixer")
    profile = tightfit.measure(model, batch, loss=loss)
    plan = full_plan(profile, 2**50)
    verdict = tightfit.verify(model, batch, plan, loss=loss, reference_budget_bytes=2**50)
    assert verdict.rng_equal
    assert verdict.gradients_equal, verdict.differing
    assert verdict.replayed_ops > 0


@pytest.mark.needs_results
def test_a_region_that_uses_two_streams_is_kept_not_replayed_wrongly() -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)
            self.side = torch.cuda.Stream()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x).sin()
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                z = self.b(y).exp().tanh()
            torch.cuda.current_stream().wait_stream(self.side)
            return (y + z).pow(2).mean()

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("streams are not copied")

    model, x = TwoStreams().to("cuda"), torch.randn(64, 256, device="cuda")
    profile = tightfit.measure(model, x)
    plan = full_plan(profile, 2**50)
    verdict = tightfit.verify(model, x, plan, reference_budget_bytes=2**50)
    assert verdict.gradients_equal, verdict.differing
