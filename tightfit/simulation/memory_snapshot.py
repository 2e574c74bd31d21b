"""The memory of a predicted step, as PyTorch writes down that of a real one: pytorch.org/memory_viz opens it.

PyTorch describes the format in ``torch/cuda/_memory_viz.py``: segments with their blocks as they are at the end, and a
trace of what was allocated and freed before, each with the frames that asked for it.  In place of Python's frames stand
the region and the operation that made the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tightfit.records import AllocatorState, Decision, EventKind, Profile, SharedTape
from tightfit.simulation.allocator_blocks import Block
from tightfit.simulation.allocator_settings import AllocatorSettings
from tightfit.simulation.caching_allocator import CachingAllocator
from tightfit.simulation.levers.lever import Request
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.step_requests import BECOMES_GRADIENT, requests_of

_PLAIN = AllocatorState(settings="", capacity_bytes=0, beside_bytes=0, outside_bytes=0)
_RESIDENT = ("parameters", "buffers", "reached", "batch", "gradients", "optimizer_state")


def memory_snapshot(
    profile: Profile, decisions: Sequence[Decision | None], shared_tapes: Sequence[SharedTape] = ()
) -> dict[str, Any]:
    """Return the snapshot of one step, from an empty cache: what is resident is allocated first.

    Args:
        profile: of the step.
        decisions: one for each region; None: untouched.
        shared_tapes: of a plan that recomputes recursively.
    """
    index = ProfileIndex(profile)
    step = requests_of(index, decisions, shared_tapes)
    names = _names(index)
    recorder = _Recorder(profile.allocator or _PLAIN)
    if profile.allocator is not None and profile.allocator.beside_bytes:
        recorder.make("libraries", profile.allocator.beside_bytes, ("libraries", "workspace"))
    for component in _RESIDENT:
        sizes = [one.nbytes for one in profile.storages if one.component == component and one.nbytes]
        for number, nbytes in enumerate(sizes):
            recorder.make((component, number), nbytes, ("resident", component))
    recorder.follow(step.forward_backward, names)
    recorder.follow(step.optimizer, names)
    return recorder.snapshot()


def _names(index: ProfileIndex) -> Mapping[int, tuple[str, str]]:
    """Return for each storage the region and the operation that first wrote it."""
    profile = index.profile
    found: dict[int, tuple[str, str]] = {}
    for value in profile.values:
        if value.op >= 0 and value.storage not in found:
            region = profile.regions[index.region_of_op[value.op]].key
            found[value.storage] = region, profile.signatures[profile.ops[value.op].signature].name
    latest = ("", "")
    for kind, a in profile.events:  # what is made in backward and by the optimizer has no value
        if kind == EventKind.OTHER_OP:
            latest = "backward or optimizer", profile.signatures[a].name
        elif kind == EventKind.ALLOC and a not in found:
            found[a] = latest if latest[0] else ("forward", "")
    return found


class _Recorder:
    def __init__(self, state: AllocatorState) -> None:
        self._allocator = CachingAllocator(
            AllocatorSettings.parse(state.settings), capacity_bytes=state.capacity_bytes or 2**40
        )
        self._settings = state.settings
        self._places: dict[object, tuple[int, int, tuple[str, str], int]] = {}
        self._trace: list[dict[str, Any]] = []

    def make(self, thing: object, nbytes: int, name: tuple[str, str], stream: int = 0) -> None:
        """Allocate something."""
        reserved = self._allocator.reserved_bytes
        address = self._allocator.allocate(nbytes, stream)
        if more := self._allocator.reserved_bytes - reserved:
            self._note("segment_alloc", address, more, name, stream)
        self._places[thing] = address, nbytes, name, stream
        self._note("alloc", address, nbytes, name, stream)

    def free(self, thing: object) -> None:
        """Free it."""
        address, nbytes, name, stream = self._places.pop(thing)
        self._allocator.free(address)
        for action in ("free_requested", "free_completed"):
            self._note(action, address, nbytes, name, stream)

    def follow(self, requests: Sequence[Request], names: Mapping[int, tuple[str, str]]) -> None:
        """Do what a step asks for."""
        for thing, nbytes, stream in requests:
            if nbytes > 0:
                self.make(thing, nbytes, names.get(thing, ("recomputed", "or workspace")), stream)
            elif thing in self._places and nbytes in (0, BECOMES_GRADIENT):
                self.free(thing)

    def _note(self, action: str, address: int, nbytes: int, name: tuple[str, str], stream: int) -> None:
        self._trace.append(
            {
                "action": action,
                "addr": address,
                "size": nbytes,
                "stream": stream,
                "time_us": len(self._trace),
                "frames": _frames(name),
            }
        )

    def snapshot(self) -> dict[str, Any]:
        """Return it all."""
        used = {address: (nbytes, name) for address, nbytes, name, _ in self._places.values()}
        return {
            "segments": [_segment(blocks, used) for blocks in self._allocator.chains()],
            "device_traces": [self._trace],
            "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": self._settings},
        }


def _frames(name: tuple[str, str]) -> list[dict[str, Any]]:
    region, operation = name
    return [{"name": operation, "filename": region, "line": 0}]


def _segment(blocks: Sequence[Block], used: Mapping[int, tuple[int, tuple[str, str]]]) -> dict[str, Any]:
    first = blocks[0]
    total = sum(block.nbytes for block in blocks)
    allocated = sum(block.nbytes for block in blocks if not block.is_free)
    return {
        "device": 0,
        "address": first.address,
        "total_size": total,
        "stream": first.stream,
        "segment_type": "small" if first.pool.is_small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": first.segment is not None,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(used[block.address][0] for block in blocks if not block.is_free),
        "frames": [],
        "blocks": list(_blocks(blocks, used)),
    }


def _blocks(blocks: Sequence[Block], used: Mapping[int, tuple[int, tuple[str, str]]]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        requested, name = (0, ("", "")) if block.is_free else used[block.address]
        yield {
            "address": block.address,
            "size": block.nbytes,
            "requested_size": requested,
            "state": "inactive" if block.is_free else "active_allocated",
            "frames": [] if block.is_free else _frames(name),
        }
