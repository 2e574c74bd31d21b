"""Leave our dispatch modes while a backward inside forward runs a node whose formula asks whether any mode is on.

Some of autograd's formulas (`areAnyTensorSubclassLike` in PyTorch's sources) take another way where a mode is on, as it
may stand for tensors without data: the gradient of a product is then a product of partial products, and no quotient.
Its bits differ from the plain step's, in which no mode is on.  What such a node computes is therefore not seen, and
kept like everything that is unknown.

The list is of those whose gradients, or the graph that they make of them, were seen to differ when PyTorch's samples of
all its operators (`torch.testing._internal`, 2.13) were differentiated with a mode and without one.
"""

from __future__ import annotations

from typing import Any

from tightfit._torch_private.autograd import current_graph_node
from tightfit._torch_private.dispatch import dispatch_depth, leave_own_modes_in_node

_ASKING = frozenset(
    {
        "CumprodBackward0", "LinalgDetBackward0", "LinalgEigBackward0", "LinalgEighBackward0",
        "LinalgHouseholderProductBackward0", "LinalgMatrixExpBackward0", "MaskedFillBackward1", "OrmqrBackward0",
        "ProdBackward0", "ProdBackward1",
    }
)  # fmt: skip
#: Of a node: it leaves our modes by itself.
_LEAVES = "tightfit leaves its modes"


def leave_modes_if_asked() -> None:
    """Leave our modes until the node that runs now has ended, if it asks for them; for who unpacks what it saved."""
    if dispatch_depth() and type(current_graph_node()).__name__ in _ASKING:
        leave_own_modes_in_node()


def leave_modes_in_graph(node: Any) -> None:
    """Have our modes left in all the nodes that ask for them, from one on: also in those that saved nothing with us."""
    seen = {node}
    stack = [node]
    while stack:
        one = stack.pop()
        if type(one).__name__ in _ASKING and _LEAVES not in one.metadata:
            one.metadata[_LEAVES] = True
            one.register_prehook(_leave)
        for other, _ in one.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                stack.append(other)


def _leave(_: Any) -> None:
    leave_own_modes_in_node()
