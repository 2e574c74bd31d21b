"""Random small modules: a program is a list of instructions that Hypothesis draws, run on a list of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.replay.further_instructions import FURTHER, Checkpointed, Fused
from tests.replay.instructions import INSTRUCTIONS, main_of

Tensor = torch.Tensor
_INSTRUCTIONS = INSTRUCTIONS | FURTHER


@dataclass
class Result:
    """An output that is no tuple and no dict."""

    main: Tensor
    extra: dict[str, Tensor]


class Block(nn.Module):
    """A submodule that is called several times, with keyword arguments, and returns various containers."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(columns)
        self.up = nn.Linear(columns, 2 * columns)
        self.down = nn.Linear(2 * columns, columns)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0, form: int = 0) -> Any:
        self.calls += 1  # Python state: touched once a step, whatever is replayed
        hidden = F.gelu(self.up(self.norm(x)))
        if self.calls % 2:
            hidden = hidden.mul_(scale)
        y = F.dropout(self.down(hidden), 0.2) + x
        return (y, (y, hidden), {"y": y}, Result(y, {"hidden": hidden}))[form % 4]


class Parent(nn.Module):
    """Shares a block with the program that it is part of."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return main_of(self.block(a.sin(), form=1)) * b


class Again(nn.Module):
    """Calls the program that it belongs to, which is no child of it."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.__dict__["program"] = program

    def forward(self, x: Tensor) -> Tensor:
        result = self.program(x.sin())
        return main_of(result if not isinstance(result, dict) else result["last"]).exp().clamp_max(2)


class Program(nn.Module):
    """Runs `code`: (instruction, operand, operand) triples."""

    def __init__(self, code: list[tuple[str, int, int]], rows: int, columns: int, form: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code, self.rows, self.columns, self.form = code, rows, columns, form
        self.slope = ""
        """One of `SLOPES`: what the loss differentiates by, inside forward."""
        self.linears = nn.ModuleList(nn.Linear(columns, columns) for _ in range(2))
        self.tied = nn.Linear(columns, columns, bias=False)
        self.tied.weight = self.linears[0].weight  # type: ignore[union-attr]  # a layer of the list
        self.block = Block(columns)
        self.batch_norm = nn.BatchNorm1d(columns)
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.frozen = nn.Linear(columns, columns).requires_grad_(False)
        self.gru_cell = nn.GRUCell(columns, columns)
        self.lstm = nn.LSTM(columns, columns, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(columns, columns))
        self.parent = Parent(self.block)
        self.again = Again(self)
        self.register_buffer("count", torch.ones(columns))
        self.register_buffer("swapped", torch.ones(columns))
        names = {name for name, _, _ in code}
        if "compiled block" in names:
            self.fused = Fused(columns)
        if any("checkpoints itself" in name for name in names):
            self.checkpointed = Checkpointed(columns)
        self.reset()

    @property
    def batch(self) -> Tensor:
        return torch.randn(self.rows, self.columns, generator=torch.Generator().manual_seed(1))

    def reset(self) -> None:
        """Python state as it was at the start."""
        self.steps = self.block.calls = self.depth = 0

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Any:
        self.steps += 1
        values = [self.linears[0](x) * gain]
        for name, a, b in self.code:
            operands = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(_INSTRUCTIONS[name](self, *operands))
        last, other = values[-1], values[len(values) // 2]
        return ((last, other), {"last": last, "other": other}, Result(last, {"other": other}))[self.form % 3]


#: Of a gradient penalty: none, by the batch, by the weights, by the batch and by that again.
SLOPES = ("", "batch", "weights", "twice")


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    slope = getattr(model, "slope", "")
    if not slope:
        return _plain_loss_of(model, batch)
    x = batch.clone().requires_grad_()
    loss = _plain_loss_of(model, x)
    by = [x] if slope != "weights" else [weight for weight in model.parameters() if weight.requires_grad]
    slopes = [g for g in torch.autograd.grad(loss, by, create_graph=True, allow_unused=True) if g is not None]
    if slope == "twice" and slopes:
        (second,) = torch.autograd.grad(slopes[0].sin().sum(), x, create_graph=True, allow_unused=True)
        slopes += [] if second is None else [second]
    return loss + sum(g.pow(2).mean() for g in slopes)


def _plain_loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    result = model(batch, gain=0.5)
    if isinstance(result, tuple):
        tensors = result
    elif isinstance(result, dict):
        tensors = tuple(result.values())
    else:
        tensors = (result.main, *result.extra.values())
    return sum((F.log_softmax(t, -1) * t.tanh()).mean() for t in tensors)  # type: ignore[return-value]  # a sum of tensors is a tensor


@st.composite
def programs(
    draw: st.DrawFn, *, without: tuple[str, ...] = (), rows: int = 4, columns: int = 8, further: bool = False
) -> Program:
    """A module with a few instructions, `further` ones among them; the seed of its weights is fixed."""
    names = st.sampled_from([name for name in (_INSTRUCTIONS if further else INSTRUCTIONS) if name not in without])
    operand = st.integers(0, 3)
    code = draw(st.lists(st.tuples(names, operand, operand), min_size=2, max_size=10))
    return Program(code, rows, columns, draw(st.integers(0, 5)))
