"""`tightfit doctor`: this machine's devices, what is installed, and whether the engine works here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import tightfit
from tightfit.device.registry import devices
from tightfit.errors import TightfitError
from tightfit.profiling.cost_cache import cache_folder
from tightfit.train.launch.launcher import usable_cores
from tightfit.units import format_bytes

#: Packages that are used where they are installed, and what for.
_EXTRAS = {
    "datasets": "folders that the datasets library has saved",
    "pillow": "folders of images",
    "transformers": "models of the transformers library",
    "scikit-learn": "the dataset digits",
    "statsmodels": "the dataset co2",
    "matplotlib": "tightfit frontier --output, tightfit report --plots",
    "tensorboard": "--tensorboard",
    "shtab": "tightfit --print-completion",
}
_REQUIRED = ("torch", "numpy", "highspy", "safetensors", "rich", "PyYAML")


def examine() -> dict[str, Any]:
    """Find everything that `tightfit doctor` prints, as plain data."""
    return {
        "tightfit": tightfit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "devices": [
            {
                "device": str(device.torch_device),
                "name": device.name(),
                "memory_bytes": device.capacity_bytes(),
                "free_bytes": device.free_bytes(),
            }
            for device in devices()
        ],
        "required": {name: _version(name) for name in _REQUIRED},
        "optional": {name: _version(name) for name in _EXTRAS},
        "cost_cache": None if cache_folder() is None else str(cache_folder()),
        "self_test": _self_test(),
    }


def format_examination(found: dict[str, Any]) -> str:
    """Format the findings as text."""
    lines = [
        f"tightfit {found['tightfit']} on Python {found['python']}, {found['platform']}",
        *(
            f"device    {one['device']}: {one['name']}, {format_bytes(one['memory_bytes'])}, "
            f"{format_bytes(one['free_bytes'])} free"
            for one in found["devices"]
        ),
        f"threads   {found['threads']} of {found['cpu_cores']} cores",
        "needed    " + ", ".join(f"{name} {number or 'MISSING'}" for name, number in found["required"].items()),
    ]
    for name, number in found["optional"].items():
        lines.append(f"optional  {name} {number or 'not installed'}: {_EXTRAS[name]}")
    lines.append(f"costs     of operations are kept in {found['cost_cache'] or 'memory only'}")
    test = found["self_test"]
    lines.append(f"self-test {'passed' if test['ok'] else 'FAILED'}: {test['says']}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _self_test() -> dict[str, Any]:
    """Run a small step in half of its memory, and compare it with the plain one."""
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Sigmoid()) for _ in range(6)]
    model = torch.nn.Sequential(*blocks, torch.nn.Linear(64, 1))
    batch = torch.randn(256, 64)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = model(batch).pow(2).mean()
        return value

    try:
        profile = tightfit.measure(model, batch, loss=loss)
        plans = tightfit.frontier(profile, points=3)
        verdict = tightfit.verify(model, batch, plans[1], loss=loss, reference_budget_bytes=1 << 40)
    except TightfitError as problem:
        return {"ok": False, "says": str(problem)}
    ok = bool(verdict.gradients_equal) and verdict.measured_peak_bytes <= verdict.budget_bytes
    return {
        "ok": ok,
        "says": f"peak {format_bytes(verdict.measured_peak_bytes)} of {format_bytes(verdict.budget_bytes)}, gradients "
        f"{'equal' if verdict.gradients_equal else 'NOT equal'} to the plain step's",
    }
