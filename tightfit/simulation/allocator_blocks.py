"""What the model of the caching allocator is made of: blocks, the pools of free ones, and segments that grow."""

from __future__ import annotations

from bisect import bisect_left, insort


class Segment:
    """A range of the driver's virtual addresses that pages are mapped into."""

    __slots__ = ("address", "page_bytes")

    def __init__(self, address: int, page_bytes: int) -> None:
        self.address = address
        self.page_bytes = page_bytes

    def page_before(self, address: int) -> int:
        """Return the last start of a page up to an address."""
        return address - (address - self.address) % self.page_bytes

    def page_after(self, address: int) -> int:
        """Return the first start of a page from an address on."""
        return address + (self.address - address) % self.page_bytes


class Block:
    """A stretch of a segment: in use, free, or (where segments grow) addresses without memory."""

    __slots__ = (
        "address", "after", "age_base", "before", "is_free", "is_mapped", "nbytes", "pool", "segment", "stream",
    )  # fmt: skip

    def __init__(self, pool: Pool, stream: int, address: int, nbytes: int, segment: Segment | None) -> None:
        self.pool = pool
        self.stream = stream
        self.address = address
        self.nbytes = nbytes
        self.segment = segment  # that grows; None: the block is of a segment of fixed size
        self.is_free = True
        self.is_mapped = True
        self.before: Block | None = None  # its neighbours in the segment
        self.after: Block | None = None
        self.age_base = 0

    @property
    def is_split(self) -> bool:
        """Tell whether its segment has other blocks, too."""
        return self.before is not None or self.after is not None

    @property
    def growing_bytes(self) -> int:
        """Return the bytes it would have if all addresses behind it got memory."""
        after = self.after
        return self.nbytes + (after.nbytes if after is not None and not after.is_mapped else 0)

    def put_between(self, before: Block | None, after: Block | None) -> None:
        """Make these its neighbours."""
        self.before, self.after = before, after
        if before is not None:
            before.after = self
        if after is not None:
            after.before = self


class Pool:
    """The free blocks of one pool, smallest first within a stream, and addresses that have no memory yet."""

    __slots__ = ("_free", "_unmapped", "blocks", "is_small", "searches")

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.searches = 0
        self.blocks: dict[int, Block] = {}  # free or unmapped, by address
        self._free: list[tuple[int, int, int]] = []  # stream, size, address
        self._unmapped: list[tuple[int, int]] = []  # stream, address

    def insert(self, block: Block) -> None:
        """Add a block that is free or has no memory."""
        block.age_base = self.searches
        self.blocks[block.address] = block
        if block.is_mapped:
            insort(self._free, (block.stream, block.nbytes, block.address))
        else:
            insort(self._unmapped, (block.stream, block.address))

    def remove(self, block: Block) -> None:
        """Take a block out, before anything of it changes."""
        del self.blocks[block.address]
        if block.is_mapped:
            free = self._free
            del free[bisect_left(free, (block.stream, block.nbytes, block.address))]
        else:
            del self._unmapped[bisect_left(self._unmapped, (block.stream, block.address))]

    def first_from(self, stream: int, nbytes: int) -> int:
        """Return the place of the smallest free block of a stream that has so many bytes."""
        return bisect_left(self._free, (stream, nbytes, 0))

    def at(self, place: int, stream: int) -> Block | None:
        """Return the free block at a place; None if there is none of that stream."""
        if not 0 <= place < len(self._free) or self._free[place][0] != stream:
            return None
        return self.blocks[self._free[place][2]]

    def free_blocks(self) -> list[Block]:
        """Return all free blocks, in their order."""
        return [self.blocks[address] for _, _, address in self._free]

    def unmapped_blocks(self, stream: int) -> list[Block]:
        """Return a stream's addresses that have no memory, the lowest first."""
        return [self.blocks[address] for owner, address in self._unmapped if owner == stream]
