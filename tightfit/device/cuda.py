"""CUDA GPUs: memory as the caching allocator and the driver account for it."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch

from tightfit._torch_private.libraries import cuda_allocator_settings, current_cuda_stream
from tightfit.device.cuda_timer import CudaTimer, flushing_bytes
from tightfit.device.device import Device, OperationTimer
from tightfit.device.fp32_precision import fp32_precision
from tightfit.device.nvml import process_bytes
from tightfit.errors import UnsupportedInput
from tightfit.records import AllocatorState
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import SMALL_SEGMENT_BYTES

Result = TypeVar("Result")

#: Operations that use cuBLAS, which keeps a workspace for each thread that does.
_OF_CUBLAS = re.compile(r"aten\.(?:\w*mm|mv|addmv|dot|vdot|linear|addbmm)\b|aten\.\w*attention\w*\b")
#: What a training loop has of its own in the allocator's small segments: the next batch before it lets go of the last
#: one, losses, metrics. One segment.
_OF_THE_LOOP_BYTES = SMALL_SEGMENT_BYTES

#: A context and libraries with the kernels that they have loaded take no more, usually.
_CONTEXT_BYTES = 640 << 20

#: What a second stream works on, so that its kernels take longer than their launches, and how many there are.
_BESIDE_BYTES = 8 << 20
_BESIDE_KERNELS = 32


class CudaDevice(Device):
    """A GPU.  The budget counts reserved bytes and this process's bytes outside PyTorch (context, libraries)."""

    kind = "cuda"
    label = "CUDA"
    caches_memory = True
    pins_memory = True
    trains_in_fp16 = True
    backends = ("nccl", "gloo", "mpi", "ucc")
    out_of_memory_messages = re.compile(r"out of memory|CU[A-Z]+_STATUS_(?:\w+_)?ALLOC(?:ATION)?_FAILED", re.IGNORECASE)

    @classmethod
    def count(cls) -> int:
        """Count the GPUs that PyTorch can use."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @classmethod
    def is_initialized(cls) -> bool:
        """Tell whether this process has a CUDA context."""
        return bool(torch.cuda.is_initialized())

    @classmethod
    def is_capturing(cls) -> bool:
        """Tell whether the current stream is captured into a CUDA graph."""
        return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())

    @classmethod
    def random_states(cls) -> list[torch.Tensor]:
        """Copy the generators' states: a few bytes of host memory each."""
        return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    @classmethod
    def set_random_states(cls, states: Sequence[torch.Tensor]) -> None:
        """Put the generators back, those of the GPUs that are still there."""
        for index, state in enumerate(states[: cls.count()]):
            torch.cuda.set_rng_state(state, index)

    @classmethod
    @contextmanager
    def deterministic_libraries(cls) -> Iterator[None]:
        """Give cuBLAS a workspace of its own, and keep cuDNN from trying kernels out."""
        before = torch.backends.cudnn.benchmark
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def kernel_settings(self) -> tuple[object, ...]:
        """Return the settings of PyTorch and of cuDNN by which kernels are chosen."""
        cudnn = torch.backends.cudnn
        return *super().kernel_settings(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic

    def convolutions_differ_by_thread(self) -> str:
        """Return why, while cuDNN tries out kernels: it remembers by thread which one was the fastest."""
        cudnn = torch.backends.cudnn
        if not (cudnn.benchmark and cudnn.enabled and torch.autograd.is_multithreading_enabled()):
            return ""
        return "cuDNN tries kernels out anew in backward's thread (torch.backends.cudnn.benchmark)"

    def warm_up(self, model: torch.nn.Module) -> None:
        """Let cuBLAS take its workspaces, and cuDNN make the random state of its recurrent layers' dropout, if used."""
        if any(parameter.ndim == 2 for parameter in model.parameters()):  # matrices are multiplied
            self._start_cublas_alone()
        kind = torch.nn.RNNBase
        if any(isinstance(module, kind) and module.training and module.dropout for module in model.modules()):
            first = torch.nn.LSTM(1, 1, num_layers=2, dropout=0.5, device=self.torch_device)
            with torch.no_grad():
                first(torch.zeros(1, 1, 1, device=self.torch_device))

    @contextmanager
    def busy_beside(self) -> Iterator[None]:
        """Keep a second stream busy inside the context; not where there is no memory for that."""
        here, beside = torch.cuda.current_stream(self.torch_device), torch.cuda.Stream(self.torch_device)
        try:
            numbers = torch.zeros(_BESIDE_BYTES // 4, device=self.torch_device)
        except torch.OutOfMemoryError:
            yield
            return
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(_BESIDE_KERNELS):
                numbers.sin_()
        try:
            yield
        finally:
            beside.synchronize()  # before its memory is given back

    def name(self) -> str:
        """Name the GPU."""
        return torch.cuda.get_device_name(self.torch_device)

    def capacity_bytes(self) -> int:
        """Return all memory of the GPU."""
        return int(torch.cuda.get_device_properties(self.torch_device).total_memory)

    def free_bytes(self) -> int:
        """Return the memory that the driver could still give out."""
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def reserved_bytes(self) -> int:
        """Return the bytes of the caching allocator's segments."""
        return torch.cuda.memory_reserved(self.torch_device)

    def held_bytes(self) -> int:
        """Return the bytes of the allocator's segments, and those of the context and the libraries."""
        return self.reserved_bytes() + self._bytes_outside_pytorch()

    def context_bytes(self) -> int:
        """Return the bytes of the context and of the libraries, after a product of matrices and its backward."""
        self._start_cublas()
        return self._bytes_outside_pytorch()

    def most_held_bytes(self) -> int | None:
        """Return the process's memory fraction in bytes, and what the allocator does not manage."""
        fraction = torch.cuda.get_per_process_memory_fraction(self._index())
        return int(fraction * self.capacity_bytes()) + self._bytes_outside_pytorch() if fraction < 1 else None

    def cap_held(self, nbytes: int) -> Callable[[], None]:
        """Set the process's memory fraction; see `Device.cap_held`."""
        index = self._index()
        before = torch.cuda.get_per_process_memory_fraction(index)
        fraction = max(0, nbytes - self._bytes_outside_pytorch()) / self.capacity_bytes()
        torch.cuda.set_per_process_memory_fraction(min(before, fraction), index)
        return lambda: torch.cuda.set_per_process_memory_fraction(before, index)

    @contextmanager
    def capped(self, nbytes: int) -> Iterator[None]:
        """Open a context with that cap; see `cap_held`."""
        put_back = self.cap_held(nbytes)
        try:
            yield
        finally:
            put_back()

    @contextmanager
    def uncapped(self) -> Iterator[None]:
        """Open a context in which the process's memory fraction is 1."""
        index = self._index()
        before = torch.cuda.get_per_process_memory_fraction(index)
        torch.cuda.set_per_process_memory_fraction(1.0, index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, index)

    def allocator_settings(self) -> AllocatorSettings:
        """Read how PyTorch's caching allocator is set up.

        Raises:
            UnsupportedInput: so that what it takes of the GPU cannot be predicted.
        """
        backend = torch.cuda.get_allocator_backend() if torch.backends.cuda.is_built() else "native"
        if backend != "native":
            raise UnsupportedInput(
                f"PyTorch's allocator on CUDA is {backend}, not its own. What that takes of the GPU is not modelled, "
                "so that no budget could be kept. Leave `backend` out of PYTORCH_ALLOC_CONF, and change no allocator."
            )
        for name in ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_MEMORY_CACHING"):
            if os.environ.get(name):
                raise UnsupportedInput(
                    f"{name} is set, with which PyTorch counts no bytes on CUDA. A budget cannot be kept that nothing "
                    "can be compared with. Unset it."
                )
        return _parsed(cuda_allocator_settings())

    def allocator_state(self, resident_bytes: int, operations: Collection[str]) -> AllocatorState:
        """Describe the caching allocator; see `Device.allocator_state`."""
        self.allocator_settings()  # only what is modelled
        self.start_libraries(operations)
        capacity_bytes = self.capacity_bytes()
        fraction = torch.cuda.get_per_process_memory_fraction(self._index())
        return AllocatorState(
            settings=cuda_allocator_settings(),
            capacity_bytes=capacity_bytes,
            beside_bytes=max(0, torch.cuda.memory_allocated(self.torch_device) - resident_bytes) + _OF_THE_LOOP_BYTES,
            outside_bytes=self._bytes_outside_pytorch(),
            cap_bytes=int(fraction * capacity_bytes) if fraction < 1 else None,
        )

    def start_libraries(self, operations: Collection[str]) -> None:
        """Let cuBLAS take its workspaces if one of the operations uses it; see `Device.start_libraries`."""
        if any(_OF_CUBLAS.match(name) for name in operations):
            self._start_cublas_alone()

    def _start_cublas_alone(self) -> None:
        """Let cuBLAS take its workspaces anew: out of the cache, each would keep a larger segment for good."""
        self.give_back()
        self._start_cublas()

    def _start_cublas(self) -> None:
        """Let cuBLAS take its workspaces: this thread's, and that of the thread in which autograd's backward runs."""
        with torch.enable_grad():
            x = torch.zeros(16, 16, device=self.torch_device, requires_grad=True)
            torch.nn.functional.linear(x, x).sum().backward()
        torch.cuda.synchronize(self.torch_device)

    def give_back(self) -> None:
        """Empty the caching allocator's cache, of what a graph in a cycle still held, too."""
        gc.collect()
        torch.cuda.empty_cache()

    def loop_tensors(self) -> Sequence[torch.Tensor]:
        """Make tensors that fill a segment for small ones; see `Device.loop_tensors`."""
        half = (_OF_THE_LOOP_BYTES // 2,)
        return [torch.empty(half, dtype=torch.uint8, device=self.torch_device) for _ in range(2)]

    def measure_peak(
        self, fn: Callable[[], Result], resident_bytes: int, *, from_empty: bool = True
    ) -> tuple[Result, int]:
        """Run `fn`; the allocator counts what is alive before by itself.  See `Device.measure_peak`."""
        device = self.torch_device
        torch.cuda.synchronize(device)
        if from_empty:
            self.give_back()
        torch.cuda.reset_peak_memory_stats(device)
        result = fn()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_reserved(device) + self._bytes_outside_pytorch()

    def _bytes_outside_pytorch(self) -> int:
        """Return what this process holds that the allocator does not manage.

        The driver tells what each process holds, and which one is this, but for containers: there it is known only if
        no other one holds as much as this one's allocator.  Otherwise it is what the GPU's users hold together beside
        that, up to what a context takes.
        """
        free_bytes, capacity_bytes = torch.cuda.mem_get_info(self.torch_device)
        reserved_bytes = self.reserved_bytes()
        most_bytes = max(0, capacity_bytes - free_bytes - reserved_bytes)
        told = process_bytes(str(torch.cuda.get_device_properties(self.torch_device).uuid))
        mine = {pid: nbytes - reserved_bytes for pid, nbytes in told.items() if nbytes >= reserved_bytes}
        candidates = [mine[os.getpid()]] if os.getpid() in mine else list(mine.values())
        return min(most_bytes, candidates[0] if len(candidates) == 1 else _CONTEXT_BYTES)

    @contextmanager
    def workspace_meter(self) -> Iterator[_WorkspaceMeter]:
        """Return a meter that asks the allocator after each operation."""
        yield _WorkspaceMeter(self.torch_device)

    def round_up(self, nbytes: int) -> int:
        """Return what the caching allocator rounds a request up to."""
        return self.allocator_settings().rounded(nbytes) if nbytes else 0

    def synchronize(self) -> None:
        """Wait for all streams of the GPU."""
        torch.cuda.synchronize(self.torch_device)

    def timer_bytes(self) -> int:
        """Return the memory that flushes the second-level cache."""
        return flushing_bytes(self.torch_device)

    def operation_timer(self, nbytes: int = 0) -> OperationTimer:
        """Return a timer that tells the GPU's time from the host's."""
        return CudaTimer(self, nbytes)

    def cost_key(self) -> dict[str, str]:
        """Return the GPU, cuDNN's version and settings, and where TF32 is used."""
        cudnn: Any = torch.backends.cudnn
        settings = f"{cudnn.version()} {cudnn.enabled} {cudnn.benchmark} {cudnn.deterministic}"
        return {
            "device": self.name(),
            "libraries": f"onednn {torch.backends.mkldnn.enabled} cudnn {settings}",
            "precision": fp32_precision(matmul=torch.backends.cuda.matmul, conv=cudnn.conv, rnn=cudnn.rnn),
        }

    def generator(self) -> torch.Generator | None:
        """Return the GPU's default generator: where no number was given, the current GPU's."""
        return torch.cuda.default_generators[self._index()]

    def sets_state_of(self, generator: torch.Generator) -> torch.Generator:
        """Return another generator that shares the state.

        Setting a generator's state directly also has cuDNN make the random state of its recurrent layers' dropout anew
        at their next call, which draws numbers that a plain step does not draw.
        """
        return generator.graphsafe_get_state()

    def current_stream(self) -> int:
        """Return the handle of this thread's current stream: asked for every saved tensor."""
        return current_cuda_stream(self._index())

    def numbered(self) -> torch.device:
        """Return the GPU with its number: the current one's where none was given."""
        return torch.device(self.kind, self._index())

    def _index(self) -> int:
        index = self.torch_device.index
        return torch.cuda.current_device() if index is None else index

    def make_current(self) -> None:
        """Make it this thread's GPU, unless it is that already because no number was given."""
        if self.torch_device.index is not None:
            torch.cuda.set_device(self.torch_device)


@lru_cache(maxsize=8)
def _parsed(settings: str) -> AllocatorSettings:
    return AllocatorSettings.parse(settings)


class _WorkspaceMeter:
    """Meters operations by the allocator's peak of allocated bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._found: dict[int, int] = {}

    @contextmanager
    def watch(self, index: int) -> Iterator[None]:
        """Meter the operation that runs inside; what it returned must still be alive at the end."""
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        self._found[index] = max(0, peak_bytes - torch.cuda.memory_allocated(self._device))

    def workspace_bytes(self) -> dict[int, int]:
        """Return, by the operation's index, the most bytes that it held beyond what it returned."""
        return dict(self._found)
