"""Building the emulated CUDA runtime: with gcc, in seconds, once for each build of PyTorch.

It goes into `build/emulated-cuda`, in a folder whose name follows from the sources and from PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.emulated_cuda.generate import defined_by, stubs

SOURCES = Path(__file__).parent / "source"
CACHE = Path(__file__).parents[2] / "build" / "emulated-cuda"
TOOLKIT = Path("/usr/local/cuda/include")
#: Preloaded, it is the runtime, cuBLAS and cuDNN; by its name it is the driver.
LIBRARY = "libcuda.so.1"
#: Its other name: NVML's, which PyTorch's allocator opens.
WATCHING = "libnvidia-ml.so.1"


class CannotBuild(Exception):
    """Something that the emulated runtime is made of or made for is missing."""


def site_packages() -> Path:
    """Find the folder that PyTorch is installed in, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(f"{sys.executable} has no PyTorch, which the emulated CUDA is made for. Install it first.")
    site = Path(spec.origin).parents[1]
    if not (site / "torch/lib/libtorch_cuda.so").exists():
        raise CannotBuild(
            f"PyTorch {version('torch')} of {sys.executable} is built for CPUs only, so that no call of CUDA is in it "
            "to be emulated. Take a CUDA build: `make test-cuda` makes an environment with one."
        )
    return site


def build() -> Path:
    """Build the library unless it is there already, and return its path."""
    site = site_packages()
    folder = CACHE / _identity(site)
    if not (folder / LIBRARY).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            _compile(site, Path(unfinished))
            folder.mkdir(exist_ok=True)
            link = Path(unfinished) / WATCHING
            link.symlink_to(LIBRARY)
            os.replace(link, folder / WATCHING)
            os.replace(Path(unfinished) / LIBRARY, folder / LIBRARY)
    return folder / LIBRARY


def environment() -> dict[str, str]:
    """Return the environment variables under which a process sees the emulated devices; built if need be."""
    library = build()
    return {
        "LD_PRELOAD": _before(str(library), "LD_PRELOAD"),
        # Whoever links or opens the driver by name, such as Triton.
        "LD_LIBRARY_PATH": _before(str(library.parent), "LD_LIBRARY_PATH"),
        # Its graph of operations is not emulated.
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    }


def _before(first: str, name: str) -> str:
    rest = [part for part in os.environ.get(name, "").split(os.pathsep) if part and part != first]
    return os.pathsep.join([first, *rest])


def _identity(site: Path) -> str:
    text = hashlib.sha256(version("torch").encode())
    for path in (*sorted(SOURCES.iterdir()), Path(__file__), Path(__file__).with_name("generate.py")):
        text.update(path.read_bytes())
    library = (site / "torch/lib/libtorch_cuda.so").stat()
    text.update(f"{site} {library.st_size} {library.st_mtime_ns}".encode())
    return text.hexdigest()[:16]


def _compile(site: Path, folder: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None or shutil.which("nm") is None:
        raise CannotBuild("gcc and nm are not both there; the emulated CUDA is compiled with them. Install gcc.")
    flags = ["-O1", "-g", "-fPIC", "-fvisibility=hidden", "-std=gnu11", "-Wall", "-Wextra"]
    flags += [f"-isystem{path}" for path in headers(site)]
    sources = sorted(SOURCES.glob("*.c"))
    _run([compiler, *flags, "-c", *map(str, sources)], folder)
    objects = [folder / f"{path.stem}.o" for path in sources]
    generated = folder / "stubs.c"
    generated.write_text(stubs(site, defined_by(objects)), encoding="utf-8")
    _run([compiler, *flags, "-c", str(generated)], folder)
    objects.append(folder / "stubs.o")
    _run(
        [compiler, "-shared", *map(str, objects), f"-Wl,-soname,{LIBRARY}", "-o", LIBRARY, "-lpthread", "-ldl"], folder
    )


def headers(site: Path) -> list[Path]:
    """Folders with CUDA's headers: of the wheels that PyTorch's CUDA builds bring, or of a toolkit."""
    wheels = [*sorted(site.glob("nvidia/cu*/include")), *sorted(site.glob("nvidia/*/include"))]
    wheels += [site / "triton/backends/nvidia/include"]  # has `crt/`, which the runtime's wheel leaves out
    found = [path for path in [*wheels, TOOLKIT] if path.exists()]
    for wanted in ("cuda_runtime_api.h", "crt/host_defines.h", "cublas_api.h", "cudnn.h"):
        if not any((path / wanted).exists() for path in found):
            raise CannotBuild(
                f"No {wanted} is in {site} or {TOOLKIT}; the emulated CUDA is compiled against it. "
                "Install PyTorch's CUDA build with its dependencies, or a CUDA toolkit."
            )
    return found


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"{Path(command[0]).name} failed on the emulated CUDA's sources:\n{done.stderr}")


if __name__ == "__main__":
    print(build())
