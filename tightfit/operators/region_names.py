"""Name the regions of a forward, the same way when measuring and when running.

A region is one call of a region module.  Where a region module calls another, its own operations before, between and
after those calls are its *segments*: ``layers#0``, ``layers#0/1``, ``layers#0/2``.  A function that the model itself
checkpoints can be a region, too: ``<checkpoint Block.run>#0``.

A backward inside forward that keeps its graph (``create_graph=True``) ends the region in which it runs; what begins
with it is ``<loss>#0~1``, after another one ``<loss>#0~2``.
"""

from __future__ import annotations

LOSS = "<loss>"
ROOT = "<model>"
#: How the path of a checkpointed function begins.
CHECKPOINT = "<checkpoint "


def is_module_below(path: str) -> bool:
    """Return whether a region's path names a module inside the model."""
    return path not in (LOSS, ROOT) and not path.startswith(CHECKPOINT)


def is_begun_by_backward(key: str) -> bool:
    """Return whether a region begins where a backward inside forward does."""
    return "~" in key.rpartition("#")[2]


class RegionCursor:
    """Follows calls of region modules and says which region is running now."""

    def __init__(self) -> None:
        self.depth = 0
        """How many region calls are open."""
        self._stack: list[tuple[str, int]] = []  # path, call index
        self._places: list[tuple[int, int]] = []  # of each: segment, backwards in it so far
        self._calls: dict[str, int] = {}

    def push(self, path: str) -> None:
        """Begin a call of the region module at `path`."""
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        self._stack.append((path, call))
        self._places.append((0, 0))
        self.depth += 1

    def pop(self) -> None:
        """End the innermost call; the caller's next segment begins."""
        self._stack.pop()
        self._places.pop()
        self.depth -= 1
        if self._places:
            self._places[-1] = (self._places[-1][0] + 1, 0)

    def interrupt(self) -> None:
        """End the running region, as a backward begins inside it."""
        segment, backwards = self._places[-1]
        self._places[-1] = (segment, backwards + 1)

    @property
    def path(self) -> str:
        """The innermost open region call's module path."""
        return self._stack[-1][0]

    @property
    def key(self) -> str:
        """The running region's key."""
        (path, call), (segment, backwards) = self._stack[-1], self._places[-1]
        return _key(path, call, segment, backwards) if segment or backwards else f"{path}#{call}"

    @property
    def key_if_interrupted(self) -> str:
        """The key of the region that a backward inside the running one would begin."""
        (path, call), (segment, backwards) = self._stack[-1], self._places[-1]
        return _key(path, call, segment, backwards + 1)


def _key(path: str, call: int, segment: int, backwards: int) -> str:
    return f"{path}#{call}" + (f"/{segment}" if segment else "") + (f"~{backwards}" if backwards else "")
