"""Read how PyTorch's CUDA caching allocator is set up, from the text of ``PYTORCH_ALLOC_CONF``.

The options and what they allow are those of ``c10/core/AllocatorConfig.cpp`` and ``c10/cuda/CUDAAllocatorConfig.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tightfit.errors import UnsupportedInput

_MIB = 2**20
#: The smallest unit of memory that is given out.
GRANULE_BYTES = 512
#: How sizes are rounded is set for each power of two, from 1 MiB to 32 GiB; smaller and larger sizes are as the ends.
_ROUNDUP_INTERVALS = 16
#: Options of page-locked host memory, of CUDA graphs, and of how calls are made: no byte of the device depends on them.
_WITHOUT_EFFECT = frozenset({
    "pinned_use_background_threads", "pinned_use_cuda_host_register", "pinned_use_hip_host_register",
    "pinned_num_register_threads", "pinned_reserve_segment_size_mb", "pinned_free_catch_all",
    "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb", "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorSettings:
    """The options of the caching allocator that decide about bytes.

    >>> AllocatorSettings.parse("expandable_segments:True, max_split_size_mb:64").max_split_bytes
    67108864
    """

    expandable_segments: bool = False
    """Segments grow and shrink by pages of the driver's virtual memory."""
    large_segment_bytes: int = 20 * _MIB
    """Size of a segment for requests between 1 and 10 MiB; of a page of growing segments for all above 1 MiB."""
    max_split_bytes: int | None = None
    """Larger blocks are never split; None: all are."""
    max_non_split_rounding_bytes: int = 20 * _MIB
    """A block that may not be split serves requests that are smaller by less than this."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * _ROUNDUP_INTERVALS
    """For each power of two from 1 MiB on: into how many sizes it is divided, to which requests are rounded up."""
    garbage_collection_threshold: float = 0.0
    """Share of the cap above which unused segments are given back before new ones are asked for; 0: never."""
    memory_fraction: float = 1.0
    """Share of the device's memory at which the process is capped from its start."""

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read the settings from a text like ``expandable_segments:True,max_split_size_mb:128``.

        Raises:
            UnsupportedInput: an option is not modelled, or not readable.
        """
        found: dict[str, object] = {}
        for name, value in re.findall(r"\s*([^:,\[\]\s]+)\s*:\s*(\[[^\]]*\]|[^,\[\]]*)", text):
            if name in _WITHOUT_EFFECT or (name == "backend" and value.strip() == "native"):
                continue
            if name == "throw_on_cudamalloc_oom" and value.strip() == "False":
                continue
            if name not in _READERS:
                raise UnsupportedInput(
                    f"PyTorch's allocator is set to {name}:{value.strip()}. How it then takes memory of the device is "
                    "not modelled, so that no budget could be kept. Leave that option out of PYTORCH_ALLOC_CONF (or "
                    "PYTORCH_CUDA_ALLOC_CONF)."
                )
            field, read = _READERS[name]
            try:
                found[field] = read(value.strip())
            except ValueError:
                raise UnsupportedInput(
                    f"PyTorch's allocator is set to {name}:{value.strip()}, which is no value of that option. What it "
                    "does to memory cannot be told. Correct PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF)."
                ) from None
        return cls(**found)  # type: ignore[arg-type]  # each by its own reader

    def rounded(self, nbytes: int) -> int:
        """Return what a request of `nbytes` is rounded up to.

        >>> AllocatorSettings().rounded(1000)
        1024
        """
        if nbytes < GRANULE_BYTES:
            return GRANULE_BYTES
        divisions = self.divisions_of(nbytes)
        if divisions <= 1 or nbytes <= GRANULE_BYTES * divisions:
            return -(-nbytes // GRANULE_BYTES) * GRANULE_BYTES
        step = (1 << (nbytes.bit_length() - 1)) // divisions
        return -(-nbytes // step) * step

    def divisions_of(self, nbytes: int) -> int:
        """Return into how many sizes the power of two below `nbytes` is divided; 0 or 1: sizes are not rounded so."""
        place = nbytes.bit_length() - 1 - _MIB.bit_length() + 1
        return self.roundup_power2_divisions[min(max(place, 0), _ROUNDUP_INTERVALS - 1)]


def _boolean(value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError(value)
    return value == "True"


def _mebibytes(value: str) -> int:
    return int(value) * _MIB


def _divisions(value: str) -> tuple[int, ...]:
    """Read one number for all sizes, or a list such as ``[256:1,512:2,>:8]`` by the size in MiB."""
    if not value.startswith("["):
        return (int(value),) * _ROUNDUP_INTERVALS
    found = [0] * _ROUNDUP_INTERVALS
    last = -1
    for entry in value.strip("[] ").split(","):
        size, _, number = (part.strip() for part in entry.partition(":"))
        if size == ">":
            found[last + 1 :] = [int(number)] * (_ROUNDUP_INTERVALS - last - 1)
            continue
        place = min(int(size).bit_length() - 1, _ROUNDUP_INTERVALS - 1)
        if last < 0:
            found[:place] = [int(number)] * place
        found[place] = int(number)
        last = place
    return tuple(found)


_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "expandable_segments": ("expandable_segments", _boolean),
    "large_segment_size_mb": ("large_segment_bytes", _mebibytes),
    "max_split_size_mb": ("max_split_bytes", _mebibytes),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _mebibytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", float),
    "per_process_memory_fraction": ("memory_fraction", float),
}
