"""What only `make fuzz` draws, as it takes long: what `torch.compile` made, and checkpoints inside checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from tests.replay.programs import Program

Tensor = torch.Tensor
Function = Callable[..., Tensor]


def past_the_dispatcher(graph: Any, inputs: Any) -> Any:
    """A compiler whose code no mode sees, forward nor backward, as inductor's."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            with _disable_current_modes():
                return graph(*args)

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(graph, inputs)


@cache
def compiled(function: Function, backend: Any) -> Function:
    """Return the function as `torch.compile` makes it, once in each process."""
    return torch.compile(function, backend=backend, dynamic=False)


def gate(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def norm(x: Tensor, y: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)).tanh() * y


def masked(x: Tensor, y: Tensor) -> Tensor:
    return F.dropout(x.sin(), 0.3) + y


def attend(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(x @ y.t() * 0.1, -1) @ x


def in_two(x: Tensor, y: Tensor) -> Tensor:
    z = x.exp().clamp_max(2)
    torch._dynamo.graph_break()
    return z.cos() * y


def writes_what_it_made(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.5
    z.mul_(y.sigmoid())
    return z.cos()


def writes_its_input(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(0.5)
    return x * y


def of_a_copy(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a.detach().sin()
    before = y.cos()
    return compiled(writes_its_input, "aot_eager")(y, b) * before


def under_no_grad(_: Program, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        gated = compiled(gate, past_the_dispatcher)(a, b)
    return b.sin() * gated


class Fused(nn.Module):
    """A block whose forward is compiled."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(columns)
        self.up, self.down = nn.Linear(columns, 2 * columns), nn.Linear(2 * columns, columns)
        self.compile(backend=past_the_dispatcher, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))).tanh()


class Checkpointed(nn.Module):
    """A block that checkpoints itself, and inside once more."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(columns, 2 * columns), nn.Linear(2 * columns, columns)

    def forward(self, x: Tensor, reentrant: tuple[bool, bool]) -> Tensor:
        def inner(hidden: Tensor) -> Tensor:
            return self.down(F.dropout(F.gelu(hidden), 0.2)).tanh()

        def outer(x: Tensor) -> Tensor:
            hidden = self.up(x.sin())
            return checkpoint(inner, hidden * 0.5, use_reentrant=reentrant[1])

        return x + checkpoint(outer, x, use_reentrant=reentrant[0])


def nested(model: Program, a: Tensor, b: Tensor, *, reentrant: tuple[bool, bool]) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return model.linears[1](x).sin()

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(inner, x.cos() * 1.5, use_reentrant=reentrant[1]).tanh() * y

    return checkpoint(outer, a, b, use_reentrant=reentrant[0])


def three_deep(model: Program, a: Tensor, b: Tensor) -> Tensor:
    def deeper(x: Tensor, depth: int) -> Tensor:
        x = F.dropout(model.linears[1](x), 0.1).tanh()
        return checkpoint(deeper, x, depth - 1, use_reentrant=False) * b if depth else x

    return checkpoint(deeper, a, 2, use_reentrant=False)


def around_modules(model: Program, a: Tensor, b: Tensor) -> Tensor:
    return checkpoint(lambda x: model.gru_cell(model.normed(x.cos()), b.sin()), a, use_reentrant=False)


def selective(_: Program, a: Tensor, b: Tensor) -> Tensor:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = str(op).startswith("aten.mm")
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(lambda x: attend(x.sin(), b).tanh(), a, use_reentrant=False, context_fn=contexts)


COMPILED: dict[str, Callable[[Program, Tensor, Tensor], Tensor]] = {
    "compiled": lambda m, a, b: compiled(gate, "aot_eager")(a, b),
    "compiled to operations": lambda m, a, b: compiled(norm, "eager")(a, b),
    "compiled past the dispatcher": lambda m, a, b: compiled(norm, past_the_dispatcher)(a, b),
    "compiled attention": lambda m, a, b: compiled(attend, past_the_dispatcher)(a.sin(), b),
    "compiled dropout": lambda m, a, b: compiled(masked, past_the_dispatcher)(a, b),
    "compiled in two": lambda m, a, b: compiled(in_two, "aot_eager")(a, b),
    "compiled in place": lambda m, a, b: compiled(writes_what_it_made, "aot_eager")(a.exp().clamp_max(2), b),
    "compiled, writing its input": of_a_copy,
    "compiled without gradients": under_no_grad,
    "compiled block": lambda m, a, b: m.fused(a.sin()) * b,
    "compiled, checkpointed": lambda m, a, b: checkpoint(
        compiled(gate, past_the_dispatcher), a.sin(), b, use_reentrant=False
    ),
}

CHECKPOINTS: dict[str, Callable[[Program, Tensor, Tensor], Tensor]] = {
    "nested checkpoints": partial(nested, reentrant=(False, False)),
    "nested checkpoints, reentrant inside": partial(nested, reentrant=(False, True)),
    "nested checkpoints, reentrant outside": partial(nested, reentrant=(True, False)),
    "nested checkpoints, both reentrant": partial(nested, reentrant=(True, True)),
    "three checkpoints": three_deep,
    "checkpointed modules": around_modules,
    "block that checkpoints itself": lambda m, a, b: m.checkpointed(a, (False, False)) * b,
    "block that checkpoints itself, reentrant": lambda m, a, b: m.checkpointed(a, (True, m.form % 2 == 1)) * b,
    "selective checkpoint": selective,
}

FURTHER = COMPILED | CHECKPOINTS
