"""Random small modules: a program is a list of instructions that Hypothesis draws, run on a list of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor


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


def main_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple):
        return result[0]
    return result["y"] if isinstance(result, dict) else result.main


class Program(nn.Module):
    """Runs `code`: (instruction, operand, operand) triples."""

    def __init__(self, code: list[tuple[str, int, int]], rows: int, columns: int, form: int) -> None:
        super().__init__()
        self.code, self.rows, self.columns, self.form = code, rows, columns, form
        self.linears = nn.ModuleList(nn.Linear(columns, columns) for _ in range(2))
        self.tied = nn.Linear(columns, columns, bias=False)
        self.tied.weight = self.linears[0].weight  # type: ignore[union-attr]
        self.block = Block(columns)
        self.batch_norm = nn.BatchNorm1d(columns)
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.frozen = nn.Linear(columns, columns).requires_grad_(False)
        self.register_buffer("count", torch.ones(columns))
        self.steps = 0

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Any:
        self.steps += 1
        values = [self.linears[0](x) * gain]
        for name, a, b in self.code:
            operands = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(INSTRUCTIONS[name](self, *operands))
        last, other = values[-1], values[len(values) // 2]
        return ((last, other), {"last": last, "other": other}, Result(last, {"other": other}))[self.form % 3]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    result = model(batch, gain=0.5)
    if isinstance(result, tuple):
        tensors = result
    elif isinstance(result, dict):
        tensors = tuple(result.values())
    else:
        tensors = (result.main, *result.extra.values())
    return sum((F.log_softmax(t, -1) * t.tanh()).mean() for t in tensors)  # type: ignore[return-value]


def fresh_in_place(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * 1.5
    y[:, : y.shape[1] // 2].mul_(2)
    y.t()[1:3].add_(0.5)
    y.add_(b.detach())
    return y.sigmoid_()


def no_grad_island(model: Program, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        gate = model.frozen(b).sigmoid()
        gate[0].zero_()
    return a * gate


def buffer_write(model: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a + model.count
    model.count.lerp_(b.detach().mean(0), 0.1)
    return y * model.count.clone()


def python_branch(model: Program, a: Tensor, b: Tensor) -> Tensor:
    return (a * b).tanh() if model.steps % 2 else (a - b).sin()


def chunks(_: Program, a: Tensor, b: Tensor) -> Tensor:
    left, right = a.chunk(2, 1)
    return torch.cat([right * b[:, : right.shape[1]], left.exp().clamp_max(3)], 1)


def conv(model: Program, a: Tensor, _: Tensor) -> Tensor:
    return model.conv(a.reshape(-1, 2, model.columns // 2)).view(model.rows, model.columns)


INSTRUCTIONS: dict[str, Callable[[Program, Tensor, Tensor], Tensor]] = {
    "linear": lambda m, a, b: m.linears[1](a),
    "tied": lambda m, a, b: m.tied(a).relu(),
    "sin": lambda m, a, b: a.sin(),
    "gelu": lambda m, a, b: F.gelu(a),
    "softmax": lambda m, a, b: F.softmax(a, -1) + b,
    "multiply": lambda m, a, b: a * b.tanh(),
    "subtract": lambda m, a, b: a - b,
    "attend": lambda m, a, b: F.softmax(a @ b.t() * 0.1, -1) @ a,
    "transpose": lambda m, a, b: a.t().contiguous().view(m.columns, m.rows).t().sin(),
    "slice": lambda m, a, b: a[:, ::2].repeat(1, 2).tanh(),
    "strided": lambda m, a, b: a.sin().as_strided((m.rows, m.columns), (1, m.rows)).exp().clamp_max(2),
    "expand": lambda m, a, b: a.mean(0, keepdim=True).expand(m.rows, m.columns) * b,
    "unbind": lambda m, a, b: torch.stack(a.unbind(0)[::-1]).sigmoid(),
    "chunks": chunks,
    "fresh in place": fresh_in_place,
    "in place": lambda m, a, b: a.mul_(0.9),  # plain autograd may refuse this; then so must the engine
    "relu in place": lambda m, a, b: F.relu((a + b), inplace=True),
    "dropout": lambda m, a, b: F.dropout(a, 0.4),
    "noise": lambda m, a, b: a * torch.rand_like(a),
    "batch norm": lambda m, a, b: m.batch_norm(a),
    "conv": conv,
    "block": lambda m, a, b: main_of(m.block(a, scale=0.7, form=m.form + m.steps)),
    "detach": lambda m, a, b: a.detach() * b.sin(),
    "no grad": no_grad_island,
    "buffer": buffer_write,
    "branch": python_branch,
    "cumsum": lambda m, a, b: a.cumsum(1).tanh(),
    "sort": lambda m, a, b: a.sort(1)[0] * b,
    "where": lambda m, a, b: torch.where(a > 0, a.exp().clamp_max(2), b),
    "checkpoint": lambda m, a, b: checkpoint(lambda x: m.linears[1](x).sin() * b, a, use_reentrant=False),
}


@st.composite
def programs(draw: st.DrawFn, *, without: tuple[str, ...] = (), rows: int = 4, columns: int = 8) -> Program:
    """A module with a few instructions; the seed of its weights is fixed."""
    names = st.sampled_from([name for name in INSTRUCTIONS if name not in without])
    operand = st.integers(0, 3)
    code = draw(st.lists(st.tuples(names, operand, operand), min_size=2, max_size=10))
    torch.manual_seed(0)
    return Program(code, rows, columns, draw(st.integers(0, 5)))
