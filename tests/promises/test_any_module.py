"""Plan any unmodified `nn.Module`; nothing asks for a class that supports it.

See https://github.com/huggingface/transformers/issues/17464.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.promises.training import Loss, same_training


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))


def reduce(result: Any) -> Tensor:
    """A scalar of every floating-point tensor in a nested result."""
    if isinstance(result, Tensor):
        return result.float().pow(2).mean() if result.is_floating_point() else torch.zeros(())
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return torch.stack([reduce(part) for part in result]).sum()
    return torch.zeros(())


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return reduce(model(*batch) if isinstance(batch, tuple) else model(batch))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Sigmoid())


class Graph(nn.Module):
    """A ModuleDict and a ParameterDict, walked by name; one member is used twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": mlp(), "b": mlp(), "unused": mlp()})
        self.gains = nn.ParameterDict({"a": nn.Parameter(torch.ones(8)), "b": nn.Parameter(torch.ones(8))})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"{name}{n}": self.parts[name](x) * self.gains[name] for n, name in enumerate("aba")}


class Pipeline(nn.ModuleList):
    """A container with a forward of its own, indexing and iterating over itself."""

    def forward(self, x: Tensor) -> Tensor:
        for place in range(len(self)):
            x = x + self[-1 - place](x)
        return x


class Slotted(nn.Module):
    """Slots beside the instance dictionary, a property, and attributes that are made when first asked for."""

    __slots__ = ("depth", "extra")

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.depth = 2
        self.extra = (1.5, None)

    @property
    def gain(self) -> float:
        return self.extra[0]

    def __getattr__(self, name: str) -> Any:
        return 0.5 if name == "made_up" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = self.inner(x) * self.gain + self.made_up
        return x


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(sum(args) * kwargs.get("gain", 1.0)).tanh()


class CallsVariadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Variadic() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x, x, x, gain=0.5) + self.inner[1](x, unknown="text", gain=x.mean())


class Point(NamedTuple):
    x: Tensor
    note: str


class Nested(nn.Module):
    """Returns containers, None, numbers, text and integers beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return {"point": Point(y.sin(), "a"), "rest": [None, 3, 2.5, (y.argmax(-1), [y.cos()])], "flag": True}


class Generator(nn.Module):
    """Yields its results, which are consumed outside, interleaved with other work."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(mlp() for _ in range(3))

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        for inner in self.inner:
            x = x + inner(x)
            yield x.sin()

    def forward(self, x: Tensor) -> Tensor:
        return sum(part * part.sigmoid() for part in self.steps(x))  # type: ignore[return-value]  # a sum of tensors is a tensor


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="mean")
        self.head = mlp()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids).tanh())


class Attention(nn.Module):
    """Returns its weights, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x.sin(), x, need_weights=True, average_attn_weights=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Any:
        out, state = self.gru(x.tanh())
        return self.head(out.sigmoid()), state


class Scripted(nn.Module):
    """Warmed up: after its first call TorchScript compiles other gradient formulas, of other rounding, plan or not."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit")  # itself
            self.inner = torch.jit.script(mlp())
        self.outer = mlp()
        for _ in range(3):
            self(floats(6, 8)).sum().backward()
        self.zero_grad(set_to_none=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).sin())


class OwnForward(nn.Module):
    """Its forward is an attribute of the instance, as some libraries patch it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        original = self.inner.forward
        self.inner.forward = lambda x: original(x) * 2  # type: ignore[method-assign]  # as users do it

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


class Recursive(nn.Module):
    """Calls itself, and a child that holds a reference back to its parent without owning it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.inner.__dict__["parent"] = self

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.inner(x).sin()
        return self(x, depth - 1) if depth else x


ZOO: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "Sequential": (mlp, floats(6, 8)),
    "nested Sequential": (lambda: nn.Sequential(mlp(), nn.Sequential(mlp(), nn.Identity(), mlp())), floats(6, 8)),
    "ModuleDict": (Graph, floats(6, 8)),
    "container with forward": (lambda: Pipeline(mlp() for _ in range(3)), floats(6, 8)),
    "slots": (Slotted, floats(6, 8)),
    "variadic": (CallsVariadic, floats(6, 8)),
    "nested results": (Nested, floats(6, 8)),
    "generator": (Generator, floats(6, 8)),
    "own forward": (OwnForward, floats(6, 8)),
    "recursive": (Recursive, floats(6, 8)),
    "jit.script": (Scripted, floats(6, 8)),
    "EmbeddingBag": (Bag, tokens(6, 4)),
    "MultiheadAttention": (Attention, floats(3, 5, 8)),
    "GRU": (Recurrent, floats(3, 4, 8)),
    "Transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        (floats(3, 5, 8), floats(3, 4, 8, seed=1)),
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_any_module_trains_as_plain(name: str) -> None:
    kind, batch = ZOO[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    loss: Loss = loss_of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = same_training(make, [batch, batch], loss)
    assert trained.dropped_bytes > 0
    assert trained.mismatches == 0
