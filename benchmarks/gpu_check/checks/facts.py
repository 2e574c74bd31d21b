"""What the machine is, and what PyTorch chooses on it: the assumptions that the other checks rest on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.registry import Report, check
from tests.emulated_cuda.counters import is_active
from tightfit.device import device_for


@check("facts", place=0, seconds=30, shows="machine, versions, attention's backends, memory outside PyTorch")
def facts(report: Report) -> None:
    """Write down what the other checks' figures depend on."""
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    report.note(
        "machine",
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        is_emulated=is_active(),
        total_bytes=total,
        free_bytes=free,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        cores=os.cpu_count(),
        variables={name: value for name, value in os.environ.items() if name.startswith(("CUDA", "PYTORCH", "CUBLAS"))},
        packages={name: importlib.util.find_spec(name) is not None for name in ("pynvml", "triton", "transformers")},
    )
    numbers = torch.arange(1000, device="cuda")
    report.claim("machine", "the GPU computes", int((numbers * 2).sum()) == 999000, needs_results=True)
    x = torch.randn(256, 256, device="cuda", requires_grad=True)
    (x @ x).sum().backward()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    device = device_for("cuda")
    report.note(
        "memory outside PyTorch, after a product and its backward",
        used_of_device_bytes=total - free,
        reserved_bytes=torch.cuda.memory_reserved(),
        allocated_bytes=torch.cuda.memory_allocated(),
        held_by_tightfits_meter_bytes=device.held_bytes(),
    )
    report.claim(
        "memory outside PyTorch, after a product and its backward",
        "the meter counts at least what the allocator reserved, and no more than the device is used",
        torch.cuda.memory_reserved() <= device.held_bytes() <= total - free,
    )
    for found in _attention():
        report.note("attention", **found)


class _Outputs(TorchDispatchMode):
    """Note attention's operations, and where each of their results is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "attention" in str(func):
            results = result if isinstance(result, tuple) else (result,)
            places = [f"{r.dtype} {r.device}" if isinstance(r, torch.Tensor) else type(r).__name__ for r in results]
            self.found.append((str(func), places))
        return result


def _attention() -> Iterator[dict[str, Any]]:
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.1):
            for kind in ("causal", "shared keys", "masked"):
                shape = (2, 8, 512, 64)
                query = torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
                heads = 2 if kind == "shared keys" else 8
                key, value = (torch.randn(2, heads, 512, 64, dtype=dtype, device="cuda") for _ in range(2))
                mask = torch.zeros(512, 512, dtype=dtype, device="cuda") if kind == "masked" else None
                outputs = _Outputs()
                try:
                    with outputs:
                        F.scaled_dot_product_attention(
                            query, key, value, mask, dropout, kind == "causal", enable_gqa=kind == "shared keys"
                        ).sum().backward()
                    found: Any = outputs.found
                except RuntimeError as error:
                    found = str(error).splitlines()[0]
                yield {"dtype": str(dtype), "dropout": dropout, "kind": kind, "operations": found}
