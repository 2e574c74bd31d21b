"""Measuring harms nothing, sees what a real step does, and falls back where fake tensors cannot go."""

from __future__ import annotations

import copy
import functools
import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tightfit
from tests.replay.helpers import retained_bytes
from tightfit import UnsupportedInput
from tightfit.device import memory as meter
from tightfit.profiling.measure import measure_step
from tightfit.simulation.simulator import ProfileIndex, simulate
from tightfit.step.snapshot import RandomState
from tightfit.step.step import Step

Tensor = torch.Tensor


class Net(nn.Module):
    """Counters, caches, buffers, tied weights, a frozen part, randomness of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1)) for _ in range(2))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(8))
        self.calls = 0
        self.history: list[int] = []
        self.cache: dict[int, Tensor] = {}
        self.mask: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        if self.mask is None:
            self.mask = torch.ones(tokens.shape[1], 8)
        scale = self.cache.setdefault(tokens.shape[1], torch.arange(8.0))
        x = self.norm((self.embed(tokens) * self.mask).transpose(1, 2)).transpose(1, 2)
        self.count += 1
        for layer in self.layers:
            x = layer(x) + self.frozen(x) * scale
        return self.head(x * random.random() * float(np.random.rand()))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def data_dependent_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens).flatten(0, 1)
    chosen = logits[logits.detach()[:, 0] > 0]
    return (chosen.sin().sum() + logits.sum()) * (1.0 if logits.detach().sum().item() > 0 else 2.0)


TOKENS = torch.randint(0, 10, (4, 6), generator=torch.Generator().manual_seed(0))


def everything(model: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "tensors": {n: (t.data_ptr(), t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()},
        "gradients": [None if p.grad is None else (p.grad.data_ptr(), p.grad.clone()) for p in model.parameters()],
        "optimizer": copy.deepcopy([list(state.items()) for state in optimizer.state.values()]),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "flags": [m.training for m in model.modules()],
        "calls": model.calls,
        "history": list(model.history),
        "cache": dict(model.cache),
        "mask": model.mask,
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "after two steps"])
@pytest.mark.parametrize("loss", [loss_of, data_dependent_loss])
@pytest.mark.parametrize("verb", ["measure", "fit"])
def test_the_model_is_untouched_bit_for_bit(verb: str, loss: Callable[..., Tensor], steps: int) -> None:
    model = Net()
    model.layers[1].eval()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        loss_of(model, TOKENS).backward()
        optimizer.step()
    if steps:
        model.head.weight.grad = None
    before, random_state = everything(model, optimizer), RandomState()
    if verb == "measure":
        tightfit.measure(model, TOKENS, loss=loss, optimizer=optimizer, clip_norm=1.0)
    else:
        tightfit.fit(model, TOKENS, budget="1GiB", loss=loss, optimizer=optimizer, grad_checkpoint="full").remove()
    after = everything(model, optimizer)
    assert [name for name in before if not equal(before[name], after[name])] == []
    assert random_state.equals(RandomState())


@functools.lru_cache
def positions(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lazy: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.lazy is None:
            self.lazy = torch.linspace(0, 1, 8)
        return (self.linear(x) * self.lazy * positions(8)).sum()


def test_no_fake_tensor_is_reachable_afterwards(fakes: Callable[[], list[Any]]) -> None:
    positions.cache_clear()
    model = Cached()
    batch = torch.randn(2, 8)
    tightfit.measure(model, batch)
    assert fakes() == []
    assert model.lazy is None
    assert type(positions(8)) is Tensor
    loss = model(batch)
    assert type(loss) is Tensor
    loss.backward()
    assert type(model.linear.weight.grad) is Tensor
    tightfit.measure(model, batch)  # now with a real tensor in the caches
    assert type(model.lazy) is Tensor
    assert type(positions(8)) is Tensor


TABLES: dict[int, tuple[Tensor, Tensor]] = {}
KEPT: Tensor | None = None


class UsesGlobals(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        global KEPT
        if self.kind == "dictionary":
            if 8 not in TABLES:
                TABLES[8] = (torch.arange(8.0).sin(), torch.arange(8.0).cos())
            return (self.linear(x) * TABLES[8][0] + TABLES[8][1]).sum()
        if KEPT is None:
            KEPT = torch.arange(8.0)
        return (self.linear(x) * KEPT).sum()


def test_a_global_dictionary_loses_what_the_fake_run_put_there() -> None:
    TABLES.clear()
    tightfit.measure(UsesGlobals("dictionary"), torch.randn(2, 8))
    assert TABLES == {}


def test_a_global_variable_that_the_fake_run_changed_is_put_back() -> None:
    global KEPT
    KEPT = None
    tightfit.measure(UsesGlobals("variable"), torch.randn(2, 8))
    assert KEPT is None
    KEPT = torch.arange(8.0)
    assert tightfit.measure(UsesGlobals("variable"), torch.randn(2, 8)).method == "real"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.pow(2).mean()


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.AdamW])
def test_a_fake_and_a_real_step_give_the_same_tables(optimizer: type[torch.optim.Optimizer] | None) -> None:
    model = Plain()
    spec = Step(optimizer=() if optimizer is None else (optimizer(model.parameters(), lr=0.1),))
    fake = measure_step(model, torch.randn(4, 32), spec)
    real = measure_step(model, torch.randn(4, 32), spec, concrete=True)
    assert (fake.method, real.method) == ("fake", "real")
    names = ["baseline", "values", "ops", "regions", "region_paths", "slots"]
    if optimizer is not torch.optim.AdamW:  # its foreach step lets go of temporaries in another order
        names += ["storages", "events"]
    for name in names:
        assert getattr(fake, name) == getattr(real, name), name
    peaks = [simulate(ProfileIndex(p), [None] * len(p.regions)).peak_bytes for p in (fake, real)]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_the_plain_peak_is_what_the_meter_measures(optimizer: type[torch.optim.Optimizer] | None) -> None:
    model = Plain()
    batch = torch.randn(64, 32)
    used = None if optimizer is None else optimizer(model.parameters())
    profile = tightfit.measure(model, batch, optimizer=used)
    predicted = simulate(ProfileIndex(profile), [None] * len(profile.regions)).peak_bytes

    def step() -> None:
        model(batch).backward()
        if used is not None:
            used.step()

    step()
    _, measured = meter.measure_peak(step, meter.resident_bytes(model, batch, used))
    assert measured == pytest.approx(predicted, rel=0.001)


def test_the_baseline_counts_every_storage_once() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = tightfit.measure(model, TOKENS, loss=loss_of, optimizer=optimizer)
    weights = sum(p.nbytes for p in model.parameters())  # tied weights are listed once
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    count = len([p for p in model.parameters() if p.requires_grad])
    assert profile.baseline == {
        "parameters": weights,
        "gradients": trained,
        "buffers": sum(b.nbytes for b in model.buffers()),
        "optimizer_state": 2 * trained + 4 * count,
        "batch": TOKENS.nbytes,
        "reached": 0,
    }


def test_a_data_dependent_model_is_measured_with_a_real_step() -> None:
    profile = tightfit.measure(Net(), TOKENS, loss=data_dependent_loss)
    assert (profile.method, profile.data_dependent) == ("real", True)
    plain = tightfit.measure(Net(), TOKENS, loss=loss_of)
    assert (plain.method, plain.data_dependent) == ("fake", False)


def test_memory_of_a_real_step_stays_below_plain() -> None:
    """What autograd saves goes to a file, so a step that does not fit can be measured."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(30)])
    batch = torch.randn(4096, 64)

    def loss(m: nn.Module, b: Tensor) -> Tensor:
        return m(b).sum()

    resident = meter.resident_bytes(model, batch)
    _, plain = meter.measure_peak(lambda: loss(model, batch).backward(), resident)
    model.zero_grad()
    spec = Step(loss=loss)
    _, measuring = meter.measure_peak(lambda: _observe_only(model, batch, spec), resident)
    assert measuring < plain / 2


def _observe_only(model: nn.Module, batch: Tensor, spec: Step) -> None:
    from tightfit.profiling import observed_run
    from tightfit.profiling.signatures import SignatureTable

    observed_run.observe_concrete(model, batch, spec, SignatureTable())


def test_measuring_leaves_no_memory_behind() -> None:
    model = Plain()
    batch = torch.randn(64, 32)
    tightfit.measure(model, batch)
    _, held = retained_bytes(lambda: _observe_and_forget(model, batch))
    assert held == 0


def _observe_and_forget(model: nn.Module, batch: Tensor) -> None:
    from tightfit.profiling import observed_run
    from tightfit.profiling.fake_tensor_leaks import NamespaceSnapshot
    from tightfit.profiling.signatures import SignatureTable

    observer = observed_run.observe_fake(model, batch, Step(), SignatureTable(), {}, NamespaceSnapshot())
    assert not isinstance(observer, observed_run.Needs)
    assert observer.observation.ops
    del observer
    gc.collect()


def test_batch_conventions() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor, *, form: str = "tensor") -> Any:
            loss = (self.linear(a) * b).sum()
            return {"tensor": loss, "mapping": {"loss": loss}, "attribute": type("R", (), {"loss": loss})}[form]

    a, b = torch.randn(2, 4), torch.randn(2, 4)
    batches: list[Any] = [(a, b), {"a": a, "b": b}]
    batches += [{"a": a, "b": b, "form": form} for form in ("mapping", "attribute")]
    profiles = [tightfit.measure(TwoInputs(), batch) for batch in batches]
    assert {len(p.ops) for p in profiles} == {len(profiles[0].ops)}
    assert profiles[0].baseline["batch"] == 64
    with pytest.raises(TypeError):
        tightfit.measure(TwoInputs(), [a, b])  # a list is one argument


def _deepspeed_engine() -> nn.Module:
    """A module whose class has the name and home of DeepSpeed's engine, which cannot be installed everywhere."""
    engine: nn.Module = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(4, 4)
    return engine


@pytest.mark.parametrize(
    ("model", "batch", "match"),
    [
        (nn.Linear(4, 4), torch.randn(2, 4), "not a scalar loss"),
        (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).requires_grad_(False), torch.randn(1, 4), "nothing to train"),
        (nn.DataParallel(nn.Linear(4, 4)), torch.randn(2, 4), "DataParallel"),
        (_deepspeed_engine(), torch.randn(2, 4), "DeepSpeed engine"),
        (torch.compile(nn.Linear(4, 1), backend="eager"), torch.randn(1, 4), "torch.compile"),
        (nn.Flatten(), torch.randn(1, 4), "nothing to train"),
        ("gpt2", torch.randn(1, 4), r"not a torch\.nn\.Module"),
    ],
)
def test_what_cannot_be_measured(model: Any, batch: Tensor, match: str) -> None:
    with pytest.raises(UnsupportedInput, match=match):
        tightfit.measure(model, batch)


def test_a_detached_loss_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="does not depend on any parameter"):
        tightfit.measure(nn.Linear(4, 1), torch.randn(1, 4), loss=lambda m, b: m(b).sum().detach())


def test_regions_are_found_and_repeated_ones_share_a_class() -> None:
    profile = tightfit.measure(Plain(), torch.randn(4, 32))
    assert profile.region_paths == ("<model>", "layers.0", "layers.1", "layers.2")
    layers = [r for r in profile.regions if r.key.startswith("layers.")]
    assert [r.key for r in layers] == ["layers.0#0", "layers.1#0", "layers.2#0"]
    assert len({r.class_id for r in layers[1:]}) == 1  # the first one reads the batch
    assert sum(r.op_count for r in profile.regions) == len(profile.ops)
    profile.check()


def test_torch_func_in_forward_is_refused_with_a_reason() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            slope = torch.func.grad(lambda t: t.sin().sum())(x.detach())
            return (self.linear(x) * slope).sum()

    with pytest.raises(UnsupportedInput, match=r"torch\.func"):
        tightfit.measure(Inner(), torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_without_sizes_are_refused_with_a_reason() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.nested.as_nested_tensor([x, x[1:]])
            return torch.nested.to_padded_tensor(self.linear(rows), 0.0).sum()

    with pytest.raises(UnsupportedInput, match=r"nested tensors of strided layout.*Use layout=torch\.jagged"):
        tightfit.measure(Inner(), torch.randn(2, 4))
