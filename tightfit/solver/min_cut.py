"""Find the lightest closed set of a directed graph, by maximum flow.

Picard 1976: choose a set of nodes that contains, with every node, all that the node requires, so that the sum of the
nodes' weights is least.  It is a minimum cut, found here by Dinic's algorithm (1970).  A leaf: plain Python.
"""

from __future__ import annotations

from collections import deque

_INFINITE = float("inf")


class Closure:
    """A graph of weighted nodes and requirements; add nodes and edges, then call `lightest`."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self._requires: list[tuple[int, int]] = []

    def node(self, weight: float) -> int:
        """Add a node; return its number."""
        self.weights.append(weight)
        return len(self.weights) - 1

    def require(self, node: int, needed: int) -> None:
        """Require that whoever takes `node` takes `needed`."""
        self._requires.append((node, needed))

    def lightest(self) -> tuple[float, list[bool]]:
        """Return the weight of the lightest closed set (at most 0, the empty one's), and which nodes are in it."""
        source, sink = len(self.weights), len(self.weights) + 1
        graph: list[list[int]] = [[] for _ in range(sink + 1)]
        heads: list[int] = []
        room: list[float] = []

        def edge(tail: int, head: int, capacity: float) -> None:
            for a, b, c in ((tail, head, capacity), (head, tail, 0.0)):
                graph[a].append(len(heads))
                heads.append(b)
                room.append(c)

        for node, weight in enumerate(self.weights):
            if weight < 0:
                edge(source, node, -weight)
            elif weight > 0:
                edge(node, sink, weight)
        for node, needed in self._requires:
            edge(node, needed, _INFINITE)
        tiny = 1e-12 * max((abs(weight) for weight in self.weights), default=0.0)
        while (levels := _levels(graph, heads, room, source, tiny))[sink] >= 0:
            places = [0] * len(graph)
            while _augment(graph, heads, room, levels, places, source, sink, tiny) > 0:
                pass
        taken = [level >= 0 for level in levels[:source]]
        return sum(weight for weight, chosen in zip(self.weights, taken, strict=True) if chosen), taken


def _levels(graph: list[list[int]], heads: list[int], room: list[float], source: int, tiny: float) -> list[int]:
    levels = [-1] * len(graph)
    levels[source] = 0
    queue = deque([source])
    while queue:
        node = queue.popleft()
        for edge in graph[node]:
            if room[edge] > tiny and levels[heads[edge]] < 0:
                levels[heads[edge]] = levels[node] + 1
                queue.append(heads[edge])
    return levels


def _augment(
    graph: list[list[int]],
    heads: list[int],
    room: list[float],
    levels: list[int],
    places: list[int],
    source: int,
    sink: int,
    tiny: float,
) -> float:
    """Send flow along one shortest path that still has room; returns how much."""
    path: list[int] = []
    node = source
    while node != sink:
        while places[node] < len(graph[node]):
            edge = graph[node][places[node]]
            if room[edge] > tiny and levels[heads[edge]] == levels[node] + 1:
                break
            places[node] += 1
        else:
            if not path:
                return 0.0
            last = path.pop()
            node = heads[last ^ 1]
            places[node] += 1
            continue
        path.append(edge)
        node = heads[edge]
    flow = min(room[edge] for edge in path)
    for edge in path:
        room[edge] -= flow
        room[edge ^ 1] += flow
    return flow
