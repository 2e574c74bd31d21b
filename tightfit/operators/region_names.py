"""Name the regions of a forward, the same way when measuring and when running.

A region is one call of a region module.  Where a region module calls another, its own operations before, between and
after those calls are its *segments*: ``layers#0``, ``layers#0/1``, ``layers#0/2``.  A function that the model itself
checkpoints can be a region, too: ``<checkpoint Block.run>#0``.
"""

from __future__ import annotations

LOSS = "<loss>"
ROOT = "<model>"
#: How the path of a checkpointed function begins.
CHECKPOINT = "<checkpoint "


def is_module_below(path: str) -> bool:
    """Return whether a region's path names a module inside the model."""
    return path not in (LOSS, ROOT) and not path.startswith(CHECKPOINT)


class RegionCursor:
    """Follows calls of region modules and says which region is running now."""

    def __init__(self) -> None:
        self._stack: list[list[int | str]] = []  # [path, call index, segment]
        self._calls: dict[str, int] = {}

    def push(self, path: str) -> None:
        """Begin a call of the region module at `path`."""
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        self._stack.append([path, call, 0])

    def pop(self) -> None:
        """End the innermost call; the caller's next segment begins."""
        self._stack.pop()
        if self._stack:
            self._stack[-1][2] += 1  # type: ignore[operator]  # the third one is a number

    @property
    def depth(self) -> int:
        """How many region calls are open."""
        return len(self._stack)

    @property
    def path(self) -> str:
        """The innermost open region call's module path."""
        return str(self._stack[-1][0])

    @property
    def key(self) -> str:
        """The running region's key."""
        path, call, segment = self._stack[-1]
        return f"{path}#{call}/{segment}" if segment else f"{path}#{call}"
