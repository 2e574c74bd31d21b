"""Processes whose address space is limited, as by ``ulimit -v``: what threads reserve of it counts there."""

from __future__ import annotations

from tightfit.units import format_bytes

#: glibc reserves 64 MiB and more for each thread, unless all share one arena; and once a large piece was freed, it
#: takes others from its heap, which falls to pieces and never shrinks, unless the size from which they are mapped is
#: fixed.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
_LEFT_BYTES = 64 * 2**20


def surroundings() -> dict[str, str]:
    """Return environment variables for a script's process, where the user has not set them."""
    # The profiler warns of what was there before it, which is as it should be.
    variables = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if _is_limited():
        variables |= _ALLOCATOR
    return variables


def limit_notes() -> tuple[str, ...]:
    """Return what a user has to know who pastes code into a script that is limited."""
    if not _is_limited():
        return ()
    return (
        f"the address space is limited (ulimit -v): {format_bytes(_LEFT_BYTES)} of it are left for what planning and "
        f"libraries take beside tensors; without {' '.join(f'{name}={value}' for name, value in _ALLOCATOR.items())} "
        f"in its environment the script would need far more",
    )


def left_free_bytes() -> int:
    """Return what is to be left of a limited address space for what is no tensor."""
    return _LEFT_BYTES if _is_limited() else 0


def _is_limited() -> bool:
    try:
        import resource
    except ModuleNotFoundError:  # not a POSIX system
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
