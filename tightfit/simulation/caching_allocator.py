"""Model PyTorch's CUDA caching allocator: what it reserves of a device for a sequence of requests, to the byte.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` (PyTorch 2.11 to 2.14), and `tests/emulated_cuda` holds the
model against it.  A request is rounded (`round_size` there) and served from the pool of small or of large blocks by the
smallest free block of its stream that is large enough, at the lowest address (`get_free_block`).  What remains of that
block is split off (`should_split`), and merged with its free neighbours when it is free again (`try_merge_blocks`).
Where no block will do, a segment is asked of the driver (`alloc_block`); where the driver or the cap refuses it, free
segments are given back, and the request is made again.

Not modelled: memory that another stream still uses when it is freed, private pools (CUDA graphs, `MemPool`).  The
driver's addresses are taken to rise; among free blocks of one size in several segments the real one may choose another.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from tightfit.simulation.allocator_blocks import Block, Pool, Segment
from tightfit.simulation.allocator_settings import GRANULE_BYTES, AllocatorSettings

_SMALL_BYTES = 2**20
"""Largest request that is served from the small pool; and the least that must remain of a large block to split it."""
SMALL_SEGMENT_BYTES = 2 * 2**20
_OWN_SEGMENT_BYTES = 10 * 2**20
"""From this size on, a request has a segment of its own size."""
_SEGMENT_STEP_BYTES = 2 * 2**20
_UNKNOWN_CAPACITY_BYTES = 2**40


class OutOfDeviceMemory(MemoryError):
    """The allocator could not serve a request, not even from what it had given back."""


class CachingAllocator:
    """The allocator of one device.

    >>> allocator = CachingAllocator(AllocatorSettings())
    >>> address = allocator.allocate(3_000_000)
    >>> allocator.allocated_bytes, allocator.reserved_bytes
    (3000320, 20971520)
    >>> allocator.free(address)
    >>> allocator.empty_cache()
    >>> allocator.reserved_bytes
    0
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        *,
        available_bytes: int | None = None,
        cap_bytes: int | None = None,
        capacity_bytes: int = _UNKNOWN_CAPACITY_BYTES,
    ) -> None:
        """Begin with nothing reserved.

        Args:
            settings: the allocator's options.
            available_bytes: what the driver can give out; None: all that is asked for.
            cap_bytes: the most that may be reserved (``set_per_process_memory_fraction``); None: no cap.
            capacity_bytes: all the device's memory, which decides how many addresses a growing segment has.
        """
        self.settings = settings
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        """How often everything unused was given back because a request could not be served."""
        self._available_bytes = available_bytes
        self.cap_bytes = cap_bytes
        self._capacity_bytes = capacity_bytes
        self._small, self._large = Pool(True), Pool(False)
        self._used: dict[int, Block] = {}
        self._next_address = _SEGMENT_STEP_BYTES

    def reset_peaks(self) -> None:
        """Let the peaks begin at what is allocated and reserved now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def allocate(self, nbytes: int, stream: int = 0) -> int:
        """Serve a request of one byte or more, and return its address.

        Raises:
            OutOfDeviceMemory: neither the cap nor the driver leaves enough.
        """
        nbytes = self.settings.rounded(nbytes)
        pool = self._small if nbytes <= _SMALL_BYTES else self._large
        block = self._take_free(pool, nbytes, stream) or self._take_new(pool, nbytes, stream)
        remaining = block.nbytes - nbytes
        if self._splits(block, nbytes, remaining):
            rest = Block(pool, stream, block.address + nbytes, remaining, block.segment)
            rest.put_between(block, block.after)
            block.nbytes = nbytes
            pool.insert(rest)
        block.is_free = False
        self._used[block.address] = block
        self.allocated_bytes += block.nbytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block.address

    def free(self, address: int) -> None:
        """Put the block at an address back into its pool."""
        block = self._used.pop(address)
        self.allocated_bytes -= block.nbytes
        block.is_free = True
        self._merge(block)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Give all segments and pages that nothing is in back to the driver."""
        self._release_unused(self._large)
        self._release_unused(self._small)

    def layout(self) -> tuple[tuple[int, ...], ...] | None:
        """Return what its answers to further requests follow from; None if they follow from past requests, too."""
        if self._collects_garbage:  # blocks have ages
            return None
        return tuple(
            (block.address, block.nbytes, block.stream, block.is_free, block.is_mapped, block.before is None)
            for block in sorted(self._blocks(), key=lambda block: block.address)
        )

    def chains(self) -> list[list[Block]]:
        """Return the blocks of each segment that have memory, in the order of their addresses."""
        found: list[list[Block]] = []
        for block in sorted(self._blocks(), key=lambda block: block.address):
            if not block.is_mapped:
                continue
            if found and found[-1][-1] is block.before:
                found[-1].append(block)
            else:
                found.append([block])
        return found

    # ------------------------------------------------------------------------------------------------ blocks

    def _blocks(self) -> Iterable[Block]:
        return chain(self._used.values(), self._small.blocks.values(), self._large.blocks.values())

    def _splits(self, block: Block, nbytes: int, remaining: int) -> bool:
        settings = self.settings
        if block.pool.is_small or settings.expandable_segments:
            return remaining >= GRANULE_BYTES
        return (settings.max_split_bytes is None or nbytes < settings.max_split_bytes) and remaining > _SMALL_BYTES

    def _merge(self, block: Block) -> None:
        """Take free neighbours into a block that is in no pool."""
        for other in (block.before, block.after):
            if other is None or not other.is_free or other.is_mapped != block.is_mapped:
                continue
            other.pool.remove(other)
            block.nbytes += other.nbytes
            if other is block.before:
                block.address = other.address
                block.put_between(other.before, block.after)
            else:
                block.put_between(block.before, other.after)

    def _take_free(self, pool: Pool, nbytes: int, stream: int) -> Block | None:
        settings = self.settings
        if self._collects_garbage:
            pool.searches += 1
        place = pool.first_from(stream, nbytes)
        block = pool.at(place, stream)
        if block is None:
            return None
        while block.segment is not None:
            # A block that can still grow counts with all that it can grow to, so that others are taken before it.
            place += 1
            larger = pool.at(place, stream)
            if larger is None or larger.growing_bytes >= block.growing_bytes:
                break
            block = larger
        most = settings.max_split_bytes
        if most is not None:
            if nbytes < most <= block.nbytes:
                return None
            if nbytes >= most and block.nbytes >= nbytes + settings.max_non_split_rounding_bytes:
                return None
        pool.remove(block)
        return block

    # ------------------------------------------------------------------------------------------------ segments

    def _take_new(self, pool: Pool, nbytes: int, stream: int) -> Block:
        if self._collects_garbage:
            self._collect_garbage()
        block = self._new(pool, nbytes, stream)
        if block is None and self._release_oversize(pool, nbytes, stream):
            block = self._new(pool, nbytes, stream)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._new(pool, nbytes, stream)
        if block is None:
            raise OutOfDeviceMemory(
                f"the allocator has {self.allocated_bytes} bytes in use and {self.reserved_bytes} reserved, and could "
                f"not reserve enough for {nbytes} more"
            )
        return block

    def _new(self, pool: Pool, nbytes: int, stream: int) -> Block | None:
        size = self._segment_bytes(nbytes)
        if self.cap_bytes is not None and self.reserved_bytes + size > self.cap_bytes:
            return None
        if self.settings.expandable_segments:
            return self._grow(pool, nbytes, stream)
        if not self._reserve(size):
            return None
        address = self._next_address
        self._next_address += size + _SEGMENT_STEP_BYTES
        return Block(pool, stream, address, size, None)

    def _segment_bytes(self, nbytes: int) -> int:
        if nbytes <= _SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if nbytes < _OWN_SEGMENT_BYTES:
            return self.settings.large_segment_bytes
        return -(-nbytes // _SEGMENT_STEP_BYTES) * _SEGMENT_STEP_BYTES

    def _reserve(self, nbytes: int) -> bool:
        if self._available_bytes is not None and self.reserved_bytes + nbytes > self._available_bytes:
            return False
        self.reserved_bytes += nbytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _release(self, block: Block) -> None:
        """Give a whole segment of fixed size back."""
        block.pool.remove(block)
        self.reserved_bytes -= block.nbytes

    def _release_unused(self, pool: Pool) -> None:
        growing = []
        for block in pool.free_blocks():
            if block.segment is not None:
                growing.append(block)
            elif not block.is_split:
                self._release(block)
        for block in growing:
            self._unmap(block)

    def _release_oversize(self, pool: Pool, nbytes: int, stream: int) -> bool:
        """Give blocks back that may not be split, until a request would fit; tell whether it would."""
        most = self.settings.max_split_bytes
        if most is None:
            return False
        wanted = max(nbytes, most)
        place = pool.first_from(stream, wanted)
        block = pool.at(place, stream)
        if block is not None and block.segment is None:
            self._release(block)
            return True
        released = 0
        while released < wanted:
            place -= 1
            block = pool.at(place, stream)
            if block is None or block.nbytes < most:
                break
            if block.segment is None:
                released += block.nbytes
                self._release(block)
        return released >= wanted

    @property
    def _collects_garbage(self) -> bool:
        return self.cap_bytes is not None and self.settings.garbage_collection_threshold > 0

    def _collect_garbage(self) -> None:
        """Give segments back that were unused for longer than others, while more than the threshold is reserved."""
        assert self.cap_bytes is not None
        threshold = int(self.settings.garbage_collection_threshold * self.cap_bytes)
        wanted = self.reserved_bytes - threshold
        pool = self._large
        whole = [block for block in pool.free_blocks() if not block.is_split]
        age = sum(pool.searches - block.age_base for block in whole)
        reclaimed = 0
        while whole and reclaimed < wanted:
            least = age / len(whole)
            old = [block for block in whole if block.segment is None and pool.searches - block.age_base >= least]
            if not old:
                break
            for block in old:
                reclaimed += block.nbytes
                age -= pool.searches - block.age_base
                self._release(block)
            whole = [block for block in whole if block not in old]

    # ------------------------------------------------------------------------------------------------ growing segments

    def _grow(self, pool: Pool, nbytes: int, stream: int) -> Block | None:
        """Map as many pages as a request needs; None where the driver has no more."""
        block = self._growable(pool, nbytes, stream)
        if not block.is_mapped and not self._map(block, min(block.nbytes, nbytes)):
            return None
        while block.nbytes < nbytes:
            behind = block.after
            assert behind is not None
            if not self._map(behind, min(nbytes - block.nbytes, behind.nbytes)):
                return None
            block = behind
        pool.remove(block)
        return block

    def _growable(self, pool: Pool, nbytes: int, stream: int) -> Block:
        """Return where there are enough addresses in a row that are unmapped or free: the lowest such place."""
        for block in pool.unmapped_blocks(stream):
            first = block.before if block.before is not None and block.before.is_free else block
            room = 0
            last: Block | None = first
            while room < nbytes and last is not None and last.is_free:
                room += last.nbytes
                last = last.after
            if room >= nbytes:
                return first
        return self._unmapped(pool, stream, self._next_address)

    def _unmapped(self, pool: Pool, stream: int, address: int) -> Block:
        """Begin a growing segment."""
        page_bytes = SMALL_SEGMENT_BYTES if pool.is_small else self.settings.large_segment_bytes
        pages = -(-(self._capacity_bytes + self._capacity_bytes // 8) // page_bytes)
        segment = Segment(address, page_bytes)
        block = Block(pool, stream, address, pages * page_bytes, segment)
        self._next_address = max(self._next_address, address + block.nbytes + _SEGMENT_STEP_BYTES)
        block.is_mapped = False
        pool.insert(block)
        return block

    def _map(self, block: Block, nbytes: int) -> bool:
        segment, pool = block.segment, block.pool
        assert segment is not None
        mapped = segment.page_after(block.address + nbytes) - block.address
        if not self._reserve(mapped):
            return False
        pool.remove(block)
        if mapped < block.nbytes:
            rest = Block(pool, block.stream, block.address + mapped, block.nbytes - mapped, segment)
            rest.is_mapped = False
            rest.put_between(block, block.after)
            pool.insert(rest)
            block.nbytes = mapped
        block.is_mapped = True
        self._merge(block)
        pool.insert(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give the pages back that are wholly within a free block."""
        segment, pool = block.segment, block.pool
        assert segment is not None
        start = segment.page_after(block.address)
        end = segment.page_before(block.address + block.nbytes)
        if start >= end:
            return
        pool.remove(block)
        for address, size in ((block.address, start - block.address), (end, block.address + block.nbytes - end)):
            if size > 0:
                piece = Block(pool, block.stream, address, size, segment)
                neighbours = (block.before, block) if address < start else (block, block.after)
                piece.put_between(*neighbours)
                pool.insert(piece)
        block.address, block.nbytes = start, end - start
        block.is_mapped = False
        self.reserved_bytes -= block.nbytes
        self._merge(block)
        if block.is_split:
            pool.insert(block)
