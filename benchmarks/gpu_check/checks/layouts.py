"""The run without data against a real step: each operation, and where and how its results lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_check.registry import Report, check
from tightfit._torch_private.dispatch import DispatchMode, fake_mode, tree_leaves
from tightfit.profiling.measure import measure_step
from tightfit.profiling.structural_copy import copy_batch, copy_model, copy_optimizer
from tightfit.records import Profile
from tightfit.solver.solver import Solver
from tightfit.step.model import give_gradients
from tightfit.step.step import Step

#: Differences written down for each model.
_MOST_SHOWN = 8


class Attention(nn.Module):
    """Attention alone, in one of PyTorch's ways to call it."""

    def __init__(self, *, dropout: float = 0.0, masked: bool = False, kv_heads: int = 4) -> None:
        super().__init__()
        self._dropout, self._masked, self._kv_heads = dropout, masked, kv_heads
        self.query = nn.Linear(256, 256)
        self.rest = nn.Linear(256, 2 * 64 * kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        query = self.query(x).unflatten(2, (4, 64)).transpose(1, 2)
        key, value = self.rest(x).unflatten(2, (2, self._kv_heads, 64)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() if self._masked else None
        return F.scaled_dot_product_attention(
            query, key, value, mask, self._dropout, not self._masked, enable_gqa=self._kv_heads != 4
        )


class Recurrent(nn.Module):
    """An LSTM of two layers, with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(256, 128, num_layers=2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2))


def _normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), norm, nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 256))


def _sequence(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 128, 256, device="cuda", dtype=dtype)


def _images() -> Tensor:
    return torch.randn(8, 3, 32, 32, device="cuda")


#: What to run, its batch, its dtype, and what of the step is not usual.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], torch.dtype, dict[str, Any]]] = {
    "attention fp32": (Attention, _sequence, torch.float32, {}),
    "attention bf16": (Attention, _sequence, torch.bfloat16, {}),
    "attention fp32, dropout": (lambda: Attention(dropout=0.1), _sequence, torch.float32, {}),
    "attention bf16, dropout and mask": (lambda: Attention(dropout=0.1, masked=True), _sequence, torch.bfloat16, {}),
    "attention bf16, shared keys": (lambda: Attention(kv_heads=2), _sequence, torch.bfloat16, {}),
    "convolution, BatchNorm": (_convolutional, _images, torch.float32, {}),
    "lstm": (Recurrent, _sequence, torch.float32, {}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 64)),
        lambda: torch.randint(0, 64, (4, 128), device="cuda"),
        torch.float32,
        {},
    ),
    "GroupNorm": (lambda: nn.Sequential(_convolutional(), nn.GroupNorm(4, 16)), _images, torch.float32, {}),
    "RMSNorm, autocast": (lambda: _normed(nn.RMSNorm(256)), _sequence, torch.float32, {"autocast": torch.bfloat16}),
    "foreach AdamW, clipping": (lambda: _normed(nn.LayerNorm(256)), _sequence, torch.float32, {"clip_norm": 1.0}),
    "fused AdamW": (lambda: _normed(nn.LayerNorm(256)), _sequence, torch.float32, {"fused": True}),
}


#: cuDNN's LSTM packs its weights by their addresses, without data too.
_NEED_DATA = ("lstm",)


@check("layouts", place=1, seconds=60, shows="measuring without data sees the operations and layouts of a real step")
def layouts(report: Report) -> None:
    """Compare for twelve small models, first as PyTorch's fake kernels say, then as measuring corrects them."""
    for name, (make, make_batch, dtype, settings) in CASES.items():
        torch.manual_seed(0)
        model, batch = make().to("cuda", dtype).train(), make_batch()
        batch = batch.to(dtype) if batch.is_floating_point() else batch
        step = _step(model, settings)
        _note_fake_kernels(report, name, model, batch, step)
        measured = measure_step(model, batch, step, cost_cache=False, untimed=True)
        real = measure_step(model, batch, step, cost_cache=False, untimed=True, concrete=True)
        wrong = _profiles_differ(measured, real)
        report.claim(name, "a step can be measured without data", measured.method == "fake" or name in _NEED_DATA)
        report.claim(name, "what was measured is the real step", not wrong, differences=wrong[:_MOST_SHOWN])


def _note_fake_kernels(report: Report, name: str, model: nn.Module, batch: Any, step: Step) -> None:
    """Note where PyTorch's fake kernels are wrong; measuring finds and corrects that, or uses a real step."""
    try:
        fake = _fake_listing(model, batch, step)
    except RuntimeError as error:
        report.note(name, without_data=str(error).splitlines()[0])
        return
    differences = list(_differences(fake, _listing(model, batch, step)))
    report.note(name, fake_kernels_differ_at=len(differences), first=differences[:_MOST_SHOWN])


def _step(model: nn.Module, settings: dict[str, Any]) -> Step:
    rest = {key: value for key, value in settings.items() if key != "fused"}
    optimizer = torch.optim.AdamW(model.parameters(), fused=settings.get("fused"))
    return Step(loss=lambda model, batch: model(batch).float().pow(2).mean(), optimizer=optimizer, **rest)


class _Listing(DispatchMode):
    """Write down each operation with device, dtype, size, strides and bytes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
        self.entries.append((str(func), tuple(map(_described, tensors))))
        return result


def _described(tensor: Tensor) -> tuple[Any, ...]:
    nbytes = tensor.untyped_storage().nbytes()
    return str(tensor.device), str(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride()), nbytes


def _listing(model: nn.Module, batch: Any, step: Step) -> list[tuple[str, tuple[Any, ...]]]:
    give_gradients(model)
    step.run(model, batch)  # the first step makes the optimizer's state
    with _Listing() as listing:
        step.run(model, batch)
    return listing.entries


def _fake_listing(model: nn.Module, batch: Any, step: Step) -> list[tuple[str, tuple[Any, ...]]]:
    mode = fake_mode()
    copied, copies = copy_model(model, mode)
    fake_batch = copy_batch(batch, mode)
    with mode:
        optimizer = copy_optimizer(step.optimizers[0], copies)
        return _listing(copied, fake_batch, replace(step, optimizer=optimizer))


def _differences(fake: list[tuple[str, Any]], real: list[tuple[str, Any]]) -> Iterator[str]:
    fake, real = ([entry for entry in listed if not _is_tensorless(entry)] for listed in (fake, real))
    if len(fake) != len(real):
        yield f"{len(fake)} operations without data, {len(real)} in the real step"
    for place, (one, other) in enumerate(zip(fake, real, strict=False)):
        if one != other:
            yield f"operation {place}: without data {one}, real {other}"


def _is_tensorless(entry: tuple[str, Any]) -> bool:
    """Tell whether an operation returns no tensor: asking for a value, or a mark of the profiler."""
    return not entry[1]


def _profiles_differ(measured: Profile, real: Profile) -> list[str]:
    wrong = []
    names = [[profile.signatures[op.signature].name for op in profile.ops] for profile in (measured, real)]
    if names[0] != names[1]:
        wrong.append(f"operations: {_first_difference(*names)}")
    sizes = [[profile.storages[profile.values[v].storage].nbytes for op in profile.ops for v in op.outputs]
             for profile in (measured, real)]  # fmt: skip
    if sizes[0] != sizes[1]:
        wrong.append(f"bytes of results: {_first_difference(*sizes)}")
    saved = [[profile.slots[place].value for place in range(len(profile.slots))] for profile in (measured, real)]
    if saved[0] != saved[1]:
        wrong.append(f"saved values: {_first_difference(*saved)}")
    peaks = [Solver(profile).plain(0).predicted_peak_bytes for profile in (measured, real)]
    if peaks[0] != peaks[1]:
        wrong.append(f"predicted peaks of the plain step: {peaks[0]}, {peaks[1]} bytes")
    return wrong


def _first_difference(a: list[Any], b: list[Any]) -> str:
    for place, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return f"at {place} {one} instead of {other}"
    return f"{len(a)} instead of {len(b)}"
