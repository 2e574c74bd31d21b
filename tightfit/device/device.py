"""What devices are asked: everything that differs between a processor, a CUDA GPU and any other device."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple, Protocol, Self, TypeVar

import torch

from tightfit.device.stopwatch import Stopwatch
from tightfit.errors import UnsupportedInput
from tightfit.records import AllocatorState

Result = TypeVar("Result")


class WorkspaceMeter(Protocol):
    """Meters the workspace of operations that run one after another."""

    def watch(self, index: int) -> AbstractContextManager[object]:
        """Meter the operation that runs inside; what it returned must still be alive at the end."""

    def workspace_bytes(self) -> dict[int, int]:
        """Return, by index, the most that each held beyond what it returned; ask after the meter's end."""


class OperationTimes(NamedTuple):
    """What one run of an operation takes, in milliseconds."""

    host_ms: float
    """The host: until it is done where the host waits for it or does it itself, else until it is submitted."""
    device_ms: float = 0.0
    """A device that works beside the host."""
    is_disturbed: bool = False
    """Others kept the host's processor from it."""

    def or_less(self, other: OperationTimes) -> OperationTimes:
        """Return the shorter ones of the times of two runs, of which one undisturbed is enough."""
        return OperationTimes(
            min(self.host_ms, other.host_ms),
            min(self.device_ms, other.device_ms),
            self.is_disturbed and other.is_disturbed,
        )


class OperationTimer:
    """Times operations that run alone on the host, or on a device of which nothing more is known: until they are done.

    A device that works beside the host has a timer of its own.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def times_ms(
        self, run: Callable[[], object], repeats: int, *, before: Callable[[], object] | None = None
    ) -> OperationTimes:
        """Return the shortest times of some runs. `before`: what is done before each, untimed."""
        best = OperationTimes(float("inf"), 0.0, is_disturbed=True)
        for _ in range(repeats):
            if before is not None:
                before()
            watch = Stopwatch()
            run()
            ms, is_disturbed = watch.read()
            best = best.or_less(OperationTimes(ms, 0.0, is_disturbed))
        return best


class Device(ABC):
    """One device: its memory and the meter of it, its clock, random generators, streams, and what its kernels do.

    A kind of device is a subclass in a file of its own, listed in `tightfit.device.registry.KINDS`.  Nothing outside
    this folder asks what kind a device is.  `device_for` finds the device of a tensor, a model or a `torch.device`.
    """

    kind: ClassVar[str]
    """The type of its `torch.device`, as in ``--device``."""
    label: ClassVar[str]
    """The kind's name in a sentence."""
    is_host: ClassVar[bool] = False
    """It is the processor: its memory is the host's, and its kernels share the caches with Python's own work."""
    adds_atomically: ClassVar[bool] = True
    """Some of its kernels add in an order that differs from run to run (see `OpInfo.blocker_with_atomics`)."""
    repetitions: ClassVar[int] = 8
    """How often a call is made again before it is trusted to give the same bits every time."""
    caches_memory: ClassVar[bool] = False
    """Its allocator keeps freed memory, so that what a step takes depends on the steps before it."""
    pins_memory: ClassVar[bool] = False
    """Batches are copied to it faster from page-locked host memory."""
    trains_in_fp16: ClassVar[bool] = False
    """Half precision is faster there than single, and gradients can be scaled."""
    backends: ClassVar[tuple[str, ...]] = ("gloo", "mpi", "ucc")
    """What can carry gradients between processes on such devices, the usual one first."""
    out_of_memory_messages: ClassVar[re.Pattern[str] | None] = None
    """How a RuntimeError of its kernels says that there is no more memory, where it is no `torch.OutOfMemoryError`."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.torch_device)!r})"

    @property
    def mesh_kind(self) -> str:
        """The name by which a mesh of such devices is made."""
        return self.kind

    # ------------------------------------------------------------------------------------------------ the kind

    @classmethod
    @abstractmethod
    def count(cls) -> int:
        """Count the devices of this kind that the machine offers to PyTorch."""

    @classmethod
    def named(cls, text: str) -> Self | None:
        """Return the device of this kind that `text` names, like ``cuda:1``; None if it names none of this kind."""
        try:
            device = torch.device(text)
        except RuntimeError:
            return None
        return cls(device) if device.type == cls.kind else None

    @classmethod
    def is_initialized(cls) -> bool:
        """Tell whether this process uses such devices already, so that a fork of it could not."""
        return False

    @classmethod
    def is_capturing(cls) -> bool:
        """Tell whether what is submitted to such a device now is captured into a graph instead of run."""
        return False

    @classmethod
    @abstractmethod
    def random_states(cls) -> list[torch.Tensor]:
        """Copy the state of each device's default generator, if such devices are in use; the host has none here."""

    @classmethod
    @abstractmethod
    def set_random_states(cls, states: Sequence[torch.Tensor]) -> None:
        """Put the generators back into the `states` that `random_states` copied."""

    @classmethod
    def deterministic_libraries(cls) -> AbstractContextManager[object]:
        """Make the libraries behind its kernels choose the same kernels every time, inside the context."""
        return nullcontext()

    # ------------------------------------------------------------------------------------------------ kernels

    def kernel_settings(self) -> tuple[object, ...]:
        """Return the settings of PyTorch by which the kernels of an operation are chosen."""
        return (torch.are_deterministic_algorithms_enabled(),)

    def convolutions_differ_by_thread(self) -> str:
        """Return why a convolution may have other bits in backward's thread than in forward's; empty if it has not."""
        return ""

    def busy_beside(self) -> AbstractContextManager[object]:
        """Keep the device busy with other work, where it can do two things at a time, inside the context."""
        return nullcontext()

    def warm_up(self, model: torch.nn.Module) -> None:  # noqa: B027  # most have nothing to do
        """Do what libraries do once, at the first call of some of a model's layers. That may draw random numbers."""

    # ------------------------------------------------------------------------------------------------ memory

    @abstractmethod
    def name(self) -> str:
        """Name the hardware."""

    @abstractmethod
    def capacity_bytes(self) -> int:
        """Return all the device's memory."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the memory that no process uses now."""

    @abstractmethod
    def reserved_bytes(self) -> int:
        """Return what PyTorch's allocator holds on to in this process, used or not; 0 if it gives all back."""

    def held_bytes(self) -> int:
        """Return what this process holds of the device's memory, of all that a budget counts, used or not."""
        return self.reserved_bytes()

    def context_bytes(self) -> int:
        """Return what this process holds of the device's memory outside PyTorch, once computing there has begun."""
        return 0

    def give_back(self) -> None:  # noqa: B027  # most allocators have nothing to give back
        """Give memory that the allocator holds on to, and nobody uses, back to the device."""

    def loop_tensors(self) -> Sequence[torch.Tensor]:
        """Make what `allocator_state` counts for a training loop's own small tensors; counted until it is let go."""
        return ()

    def most_held_bytes(self) -> int | None:
        """Return what this process may hold of the device at most; None where nothing caps it."""
        return None

    def cap_held(self, nbytes: int) -> Callable[[], None]:
        """Let this process hold no more of the device, as far as the allocator decides; a lower cap stays.

        Returns:
            What puts the cap back that was there before.

        Raises:
            UnsupportedInput: this kind of device has no cap.
        """
        raise UnsupportedInput(
            f"memory_cap=True asks for a cap on what PyTorch's allocator reserves, and that of {self.label} has none. "
            "The budget would not be enforced. Leave memory_cap out."
        )

    def capped(self, nbytes: int) -> AbstractContextManager[object]:
        """Open a context in which this process holds no more of the device, where its allocator can be told so."""
        return nullcontext()

    def uncapped(self) -> AbstractContextManager[object]:
        """Open a context in which the allocator may reserve all that the device has."""
        return nullcontext()

    @abstractmethod
    def measure_peak(
        self, fn: Callable[[], Result], resident_bytes: int, *, from_empty: bool = True
    ) -> tuple[Result, int]:
        """Run `fn` and return its result and the peak, in bytes, in the budget's terms.

        Args:
            fn: what to run.
            resident_bytes: what is alive before, for a meter that starts at zero.
            from_empty: give back what the allocator holds unused first, so that what ran before does not count; else
                the peak is what the process holds in the midst of others like this, at no cost to the next one.
        """

    @abstractmethod
    def workspace_meter(self) -> AbstractContextManager[WorkspaceMeter]:
        """Return a meter for operations that run one after another inside the context."""

    def start_libraries(self, operations: Collection[str]) -> None:  # noqa: B027  # most take nothing to keep
        """Let the libraries that these operations use take their workspaces, before other memory is in their way."""

    def allocator_state(self, resident_bytes: int, operations: Collection[str]) -> AllocatorState | None:
        """Describe the allocator as it is now, for a prediction of what it reserves; None where it gives all back.

        Args:
            resident_bytes: what of the allocated bytes is the step's own.
            operations: names of the step's operations; the libraries that these use have taken their workspace then.
        """
        return None

    def round_up(self, nbytes: int) -> int:
        """Return how many bytes the allocator takes for a storage of `nbytes`."""
        return nbytes

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor's memory is on a device of this kind."""
        return tensor.device.type == self.kind

    # ------------------------------------------------------------------------------------------------ time

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all that was submitted to it."""

    def time_ms(self, fn: Callable[[], object]) -> float:
        """Run `fn` and return its wall time in milliseconds, the device's queue emptied before and after."""
        self.synchronize()
        begin = time.perf_counter()
        fn()
        self.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def timer_bytes(self) -> int:
        """Return the memory that `operation_timer` takes for being exact."""
        return 0

    def operation_timer(self, nbytes: int = 0) -> OperationTimer:
        """Return what times single operations; it may hold so many bytes of the device's memory."""
        return OperationTimer(self)

    @abstractmethod
    def cost_key(self) -> dict[str, str]:
        """Return what the time and workspace of an operation depend on, besides PyTorch's own settings."""

    # ---------------------------------------------------------------------------------------------- generators, streams

    @abstractmethod
    def generator(self) -> torch.Generator | None:
        """Return the generator that random operations draw from by default; None if it cannot be had."""

    def sets_state_of(self, generator: torch.Generator) -> torch.Generator:
        """Return the generator through which to set the state of `generator`, and nothing else that hangs on it."""
        return generator

    def random_state_bytes(self) -> int:
        """Return what a copy of the generator's state takes of the device's memory."""
        return 0

    def current_stream(self) -> int:
        """Identify the stream that operations are submitted to now; devices with a single one have 0."""
        return 0

    # ------------------------------------------------------------------------------------------------ use

    def numbered(self) -> torch.device:
        """Return its `torch.device`, with its number where devices of this kind have one."""
        return self.torch_device

    @abstractmethod
    def make_current(self) -> None:
        """Make it the device that PyTorch takes where the kind alone is named."""

    def autocast(self, dtype: torch.dtype | None) -> torch.autocast:
        """Compute in `dtype` inside the context; None: without autocast."""
        return torch.autocast(self.kind, dtype=dtype, enabled=dtype is not None)

    def ambient_autocast(self) -> torch.dtype | None:
        """Return the dtype of the autocast context that is open now; None if there is none."""
        return torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else None
