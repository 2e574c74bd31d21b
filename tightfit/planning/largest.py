"""Find the largest number for which something that grows with it stays within a limit, asking as rarely as possible."""

from __future__ import annotations

from collections.abc import Callable


def largest_within(size_of: Callable[[int], int], limit: int, *, most: int, begin: int = 1) -> int:
    """Return the largest number from 1 to `most` whose size is within the limit; 0 if there is none.

    `begin`: a number that is thought to be near, better below.

    Sizes are nearly a straight line in the number, so that the next one asked is where the line through the last known
    ones meets the limit (regula falsi); where that converges slowly, the middle is asked instead.

    >>> asked = []
    >>> largest_within(lambda number: asked.append(number) or 100 + 7 * number, 1000, most=10**6)
    128
    >>> len(asked)
    4
    """
    known: dict[int, int] = {}

    def size(number: int) -> int:
        if number not in known:
            known[number] = size_of(number)
        return known[number]

    low, high = max(1, min(begin, most)), most + 1
    if size(low) > limit:
        if low == 1 or size(1) > limit:
            return 0
        low, high = 1, low
    guess = max(low + 1, int(low * limit / max(1, size(low))))  # as if it grew from nothing: too low, if anything
    rounds = 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if size(guess) <= limit:
            low = guess
        else:
            high = guess
        rounds += 1
        guess = _next(known, low, high, limit) if rounds % 6 else (low + min(high, 4 * low)) // 2
    return low


def _next(known: dict[int, int], low: int, high: int, limit: int) -> int:
    """Return where the line through the two known numbers that are nearest the limit meets it."""
    first, second = sorted(known, key=lambda number: (abs(known[number] - limit), number))[:2]
    slope = (known[second] - known[first]) / (second - first)
    if slope <= 0:
        return (low + min(high, 2 * low)) // 2
    return int(first + (limit - known[first]) / slope)
