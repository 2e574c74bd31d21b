"""A GPU that is not here: what is known of it stands for what a driver would say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn, TypeVar

import torch

from tightfit._torch_private.described import PLACE
from tightfit.device.described.cards import Card
from tightfit.device.device import Device, WorkspaceMeter
from tightfit.errors import UnsupportedInput
from tightfit.records import AllocatorState
from tightfit.simulation.allocator_settings import AllocatorSettings

Result = TypeVar("Result")

#: cuBLAS's workspace of each handle, as PyTorch sets it (``parseChosenWorkspaceSize`` in CublasHandlePool.cpp).
_CUBLAS_BYTES = 4096 * 2 * 1024 + 16 * 8 * 1024
_CUBLAS_BYTES_OF_HOPPER = 32 << 20
_HOPPER = 90
#: Two threads use cuBLAS, each with a handle of its own: the one of forward, and autograd's.
_HANDLES = 2


class DescribedDevice(Device):
    """A card of the list.  Nothing runs there: steps are observed on fake tensors, and times are estimated.

    Its tensors are those of `tightfit._torch_private.described`.
    """

    kind = "cuda"
    label = "a described GPU"
    caches_memory = True
    trains_in_fp16 = True

    def __init__(self, card: Card, settings: str = "") -> None:
        """Take a card; `settings` are the allocator's options, as in ``PYTORCH_ALLOC_CONF``."""
        super().__init__(PLACE)
        self.card = card
        self._settings_text = settings
        self._settings = AllocatorSettings.parse(settings)
        self._generator = torch.Generator()

    @property
    def mesh_kind(self) -> str:
        """The processor's: a mesh asks its devices for streams, and a build without CUDA has none."""
        return "cpu"

    @classmethod
    def count(cls) -> int:
        """Count none: it is not here."""
        return 0

    @classmethod
    def named(cls, text: str) -> None:
        """Return None: that it is described must be asked for (`card_named`)."""

    @classmethod
    def random_states(cls) -> list[torch.Tensor]:
        """Copy nothing."""
        return []

    @classmethod
    def set_random_states(cls, states: Sequence[torch.Tensor]) -> None:
        """Do nothing."""

    def name(self) -> str:
        """Name the card."""
        return self.card.title

    def capacity_bytes(self) -> int:
        """Return all memory that CUDA would say it has."""
        return self.card.capacity_bytes

    def free_bytes(self) -> int:
        """Return all memory beside a context: nobody else uses it."""
        return self.card.capacity_bytes - self.card.context_bytes

    def reserved_bytes(self) -> int:
        """Return 0."""
        return 0

    def held_bytes(self) -> int:
        """Return the bytes of a context: with what is free they are all that the card has."""
        return self.card.context_bytes

    def context_bytes(self) -> int:
        """Return what the driver, the context and the libraries' kernels take."""
        return self.card.context_bytes

    def measure_peak(
        self, fn: Callable[[], Result], resident_bytes: int, *, from_empty: bool = True
    ) -> tuple[Result, int]:
        """Raise `UnsupportedInput`: nothing runs there."""
        self._refuse()

    def workspace_meter(self) -> AbstractContextManager[WorkspaceMeter]:
        """Raise `UnsupportedInput`: nothing runs there."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedInput(
            f"{self.name()} is described, not here, so that nothing can be run and metered there. Give --device a "
            "device of this machine, or ask for a plan or a prediction only."
        )

    def allocator_state(self, resident_bytes: int, operations: Collection[str]) -> AllocatorState:
        """Describe the caching allocator of a process that has just begun to train there."""
        handle_bytes = _CUBLAS_BYTES_OF_HOPPER if self.card.compute_capability >= _HOPPER else _CUBLAS_BYTES
        return AllocatorState(
            settings=self._settings_text,
            capacity_bytes=self.capacity_bytes(),
            beside_bytes=_HANDLES * self.round_up(handle_bytes),
            outside_bytes=self.context_bytes(),
            cap_bytes=self.free_bytes(),
        )

    def round_up(self, nbytes: int) -> int:
        """Return what the caching allocator rounds a request up to."""
        return self._settings.rounded(nbytes) if nbytes else 0

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether the tensor stands for one on the card: under its own name, or as models see it."""
        return tensor.device.type in (PLACE.type, self.kind)

    def synchronize(self) -> None:
        """Do nothing."""

    def cost_key(self) -> dict[str, str]:
        """Return the card."""
        return {"device": self.card.name}

    def generator(self) -> torch.Generator:
        """Return one that stands for the card's: that its state can be recorded is all that counts."""
        return self._generator

    def make_current(self) -> None:
        """Do nothing."""

    def ambient_autocast(self) -> None:
        """Return None: a context that is open around the measuring is not one on the card."""
