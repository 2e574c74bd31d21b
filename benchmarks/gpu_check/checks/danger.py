"""What would end the process or its CUDA context if measuring ran it on made-up or missing data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from benchmarks.gpu_check.checks.layouts import Attention
from benchmarks.gpu_check.registry import Report, Skip, check
from tests.emulated_cuda.counters import is_active
from tightfit.solver.solver import Solver

#: One that hangs must not take the others' time; on emulated devices all are slow.
_SECONDS_EACH = None if is_active() else 45


@check("danger", place=2, seconds=100, shows="measuring what made-up data could crash leaves a working CUDA context")
def danger(report: Report) -> None:
    """Measure each in a process of its own, and multiply two matrices there afterwards."""
    for name in DANGERS:
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"from {__name__} import measured; measured({name!r})"],
                capture_output=True,
                text=True,
                timeout=_SECONDS_EACH,
                check=False,
            )
        except subprocess.TimeoutExpired:
            report.claim(name, "measured, and the context is alive", False, says=f"no end in {_SECONDS_EACH} s")
            continue
        print(done.stdout, done.stderr, flush=True)  # into the check's log
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        found = "".join((errors if done.returncode and errors else lines)[-1:])
        if done.returncode == 0 and found.startswith("skipped"):
            report.note(name, reason=found)
            continue
        report.claim(name, "measured, and the context is alive", done.returncode == 0, code=done.returncode, says=found)


def measured(name: str) -> None:
    """Measure one of `DANGERS`, and run a step under the plan that drops the most."""
    torch.manual_seed(0)
    try:
        model, batch = DANGERS[name]()
    except Skip as reason:
        print(f"skipped: {reason}")
        return
    model, batch = model.to("cuda"), batch.to("cuda")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch).float().pow(2).mean()

    profile = tightfit.measure(model, batch, loss=loss, cost_cache=False)
    plan = Solver(profile).smallest_plan()
    with tightfit.apply(model, plan, step=tightfit.Step(loss=loss)) as applied:
        for _ in range(2):
            applied.loss(model, batch).backward()
        replayed = applied.statistics.replayed_ops
    x = torch.randn(64, 64, device="cuda")
    (x @ x).sum().item()
    torch.cuda.synchronize()
    print(f"method {profile.method}, {replayed} operations replayed")


def _with_triton() -> tuple[nn.Module, Tensor]:
    try:
        from benchmarks.gpu_check.triton_kernels import TritonRmsNorm
    except ImportError as error:
        raise Skip(f"Triton cannot be imported: {error}") from None
    return nn.Sequential(nn.Linear(256, 256), TritonRmsNorm(256), nn.Linear(256, 64)), torch.randn(32, 256)


class _Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 64)
        self._fused = torch.compile(lambda x, y: F.gelu(x * 1.7 + y).sin() * y.exp() / (1 + x * x))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self._fused(self.first(x), x))


class _Pointer:
    """Memory as its address: what an extension gets."""

    def __init__(self, tensor: Tensor) -> None:
        place = (tensor.data_ptr(), False)
        self.__cuda_array_interface__ = {"data": place, "shape": tuple(tensor.shape), "typestr": "<f4", "version": 3}


class _Doubled(torch.autograd.Function):
    """Doubles in memory that it reaches by addresses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        torch.as_tensor(_Pointer(y)).copy_(torch.as_tensor(_Pointer(x))).mul_(2)
        return y

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return given * 2


class _ByAddress(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(_Doubled.apply(self.first(x).contiguous())))


class _Eight(torch.autograd.Function):
    """A product in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        one = torch.ones((), device=x.device)
        small, small_weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        ctx.save_for_backward(small, weight)
        return torch._scaled_mm(small, small_weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:
        small, weight = ctx.saved_tensors
        return given @ weight, given.t() @ small.to(given.dtype)


class _InEightBits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256, dtype=torch.bfloat16)
        self.weight = nn.Parameter(torch.randn(128, 256, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return _Eight.apply(F.gelu(self.first(x)), self.weight)


def _in_eight_bits() -> tuple[nn.Module, Tensor]:
    if torch.cuda.get_device_capability() < (8, 9):
        raise Skip("products in 8 bits need compute capability 8.9")
    return _InEightBits(), torch.randn(64, 256, dtype=torch.bfloat16)


class _Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        torch._assert_async(hidden.isfinite().all())
        return self.second(F.gelu(hidden))


DANGERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "attention fp32 with dropout, whose seed is in host memory": lambda: (
        nn.Sequential(nn.Linear(256, 256), Attention(dropout=0.1)),
        torch.randn(4, 128, 256),
    ),
    "Triton kernels": _with_triton,
    "a compiled function": lambda: (_Compiled(), torch.randn(32, 256)),
    "an extension that takes addresses": lambda: (_ByAddress(), torch.randn(32, 256)),
    "a product in 8 bits": _in_eight_bits,
    "an assertion on the device": lambda: (_Asserting(), torch.randn(32, 256)),
}
