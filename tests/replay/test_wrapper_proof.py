"""The proof of modules that save tensors which wrap others: only what can be looked at is compared."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.replay.test_module_proof import Block, applied_everywhere, assert_equal, trained
from tests.replay.test_module_recompute import Net, batch
from tightfit._torch_private.dispatch import tree_map


class Opaque(torch.Tensor):
    """Wraps a tensor, and tells nobody by PyTorch's flatten protocol."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Opaque:
        made: Opaque = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]  # no stub has it
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda one: one.inner if isinstance(one, cls) else one, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return cls(result) if isinstance(result, Tensor) else result


class Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Opaque(x * 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return getattr(gradients[0], "inner", gradients[0])


class Unwrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        result: Tensor = x.inner * 1
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return Opaque(gradients[0])


class SavesWrappers(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = Unwrap.apply(F.gelu(Wrap.apply(self.widen(self.norm(x)))))
        return x + self.narrow(hidden)


class Hiding(Opaque):
    """Wraps a tensor where nobody looks."""

    __wrapped: ClassVar[dict[int, Tensor]] = {}

    @property
    def inner(self) -> Tensor:  # type: ignore[override]  # it hides where the other one shows
        return self.__wrapped[id(self)]

    @inner.setter
    def inner(self, tensor: Tensor) -> None:
        self.__wrapped[id(self)] = tensor


class InAList(Opaque):
    """Wraps two tensors, of which only one is an attribute."""

    @property
    def inner(self) -> Tensor:  # type: ignore[override]  # as above
        return self.parts[0]

    @inner.setter
    def inner(self, tensor: Tensor) -> None:
        self.parts, self.scale = [tensor], torch.ones(())


class WrapHiding(Wrap):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Hiding(x * 1)


class WrapInAList(Wrap):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return InAList(x * 1)


class SavesHiding(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = Unwrap.apply(F.gelu(WrapHiding.apply(self.widen(self.norm(x)))))
        return x + self.narrow(hidden)


class SparseConstant(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.eye(24).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.sparse.mm(self.mask, x.flatten(1).T[:24]).mean()


class SavesLists(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = Unwrap.apply(F.gelu(WrapInAList.apply(self.widen(self.norm(x)))))
        return x + self.narrow(hidden)


def test_wrappers_are_compared_by_what_their_attributes_hold() -> None:
    plain = trained(Net(SavesWrappers), batch(), steps=2)
    model = Net(SavesWrappers)
    with applied_everywhere(model, batch()) as applied:
        assert_equal(plain, trained(model, batch(), steps=2))
        assert applied.statistics.recomputed_calls


@pytest.mark.parametrize("kind", [SavesHiding, SavesLists, SparseConstant])
def test_what_has_no_memory_to_look_at_is_no_proof(kind: type[nn.Module]) -> None:
    plain = trained(Net(kind), batch(), steps=2)
    model = Net(kind)
    with applied_everywhere(model, batch()) as applied:
        assert_equal(plain, trained(model, batch(), steps=2))
        assert applied.statistics.recomputed_calls == 0
