"""A C++ extension that is given tensors: its kernels run past the dispatcher, and nobody hands out an address."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.real_libraries.models import Block, mean_square, stack
from tests.real_libraries.trainings import five_steps

NAME = "tightfit_test_kernels"
SOURCE = Path(__file__).with_name("kernels.cpp")
CACHE = Path(__file__).parents[2] / "build" / "real-libraries"
if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The extension, compiled once for each PyTorch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    identity = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {torch.__file__}".encode()).hexdigest()[:16]
    library = CACHE / identity / f"{NAME}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        headers = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
        libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_python", "-ltorch_cpu", "-lc10"]
        with tempfile.TemporaryDirectory(dir=library.parent) as unfinished:
            made = Path(unfinished) / library.name
            command = [
                "g++",
                "-O1",
                "-shared",
                "-fPIC",
                "-std=c++20",
                *headers,
                str(SOURCE),
                "-o",
                str(made),
                *libraries,
            ]
            subprocess.run(command, check=True)
            os.replace(made, library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_function_around_a_kernel_is_made_again(kernels: Any) -> None:
    class Squash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            kernels.squash(x, out)
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
            (out,) = ctx.saved_tensors
            return grad * (1 - out * out)

    class Squashing(Block):
        def activate(self, x: Tensor) -> Tensor:
            result: Tensor = Squash.apply(x)
            return result

    peaks = five_steps(lambda: stack(Squashing), mean_square, lambda model: model)
    assert peaks.smallest <= peaks.checkpointed < peaks.plain
    functions = [op for op in peaks.profile.ops if "Squash" in peaks.profile.signatures[op.signature].name]
    assert [op.keep_reason for op in functions] == [""] * 3


def test_what_a_kernel_writes_unseen_is_kept(kernels: Any) -> None:
    class Halving(Block):
        def activate(self, x: Tensor) -> Tensor:
            kernels.halve(x)
            return super().activate(x)

    peaks = five_steps(lambda: stack(Halving), mean_square, lambda model: model)
    assert peaks.replayed_ops > 0
    assert peaks.smallest < peaks.plain
