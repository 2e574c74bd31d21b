"""What random programs are made of: each instruction takes two values of the program's shape and returns a third."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.replay import opaque_functions

if TYPE_CHECKING:
    from tests.replay.programs import Program

Tensor = torch.Tensor
Instruction = Callable[["Program", Tensor, Tensor], Tensor]


class Cube(torch.autograd.Function):
    """Saves an input and something made on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        ctx.save_for_backward(x, square)
        return square * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        x, square = ctx.saved_tensors
        return grad * (3 * square + 0 * x)


class TwoOutputs(torch.autograd.Function):
    """Saves outputs; a gradient that nobody asks for stays None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        first, second = x.sin(), x * y
        ctx.save_for_backward(x, y, first, second)
        return first, second

    @staticmethod
    def backward(ctx: Any, first_grad: Tensor | None, second_grad: Tensor | None) -> Any:  # type: ignore[override]  # PyTorch's signature is wider
        x, y, first, second = ctx.saved_tensors
        grads = [torch.zeros_like(x), torch.zeros_like(y)]
        if first_grad is not None:
            grads[0] = grads[0] + first_grad * x.cos() + 0 * first
        if second_grad is not None:
            grads = [grads[0] + second_grad * y, second_grad * x + 0 * second]
        return tuple(grads)


class ScaleInPlace(torch.autograd.Function):
    """Marks its input as written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        return grad * 0.5


class RawSine(torch.autograd.Function):
    """Computed by NumPy behind the dispatcher's back, into a fresh buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        np.sin(x.detach().numpy(), out=out.numpy())
        ctx.save_for_backward(x, out)
        return out * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        x, out = ctx.saved_tensors
        return grad * x.cos() * 2 + 0 * out


def fresh_in_place(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * 1.5
    y[:, : y.shape[1] // 2].mul_(2)
    y.t()[1:3].add_(0.5)
    y.add_(b.detach())
    return y.sigmoid_()


def views_of_views(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * 0.5 + b
    z = y.tanh()  # saves its result, not y
    part = y.view(-1)[y.shape[1] :].view(-1, y.shape[1])[::2]
    part.t()[1:].mul_(2)
    y[0].copy_(z[1])
    y.select(1, 0).zero_()
    return y.exp().clamp_max(3) * z


def slices_of_zeros(_: Program, a: Tensor, b: Tensor) -> Tensor:
    half = a.shape[1] // 2
    y = torch.zeros_like(a)
    y[:, :half] = a[:, half:].sin()
    y[:, half:] += b[:, :half].exp().clamp_max(2)
    return y.tanh()


def index_put_in_place(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    rows = torch.tensor([2, 0])
    y[rows] = b[:2].sin()
    y.index_put_((torch.tensor([1, 1]), torch.tensor([0, 3])), b[0, :2].exp().clamp_max(2), accumulate=True)
    y[0, 1] = 0.5
    return y.sin()


def scatters(_: Program, a: Tensor, b: Tensor) -> Tensor:
    where = a.detach().argsort(1)
    y = torch.zeros_like(a).scatter(1, where, b.sin()).scatter_add(1, where.flip(1), a)
    return y.gather(1, where[:, :1].expand_as(a)).tanh() + y.index_add(0, torch.tensor([0, 1]), b[:2])


def no_grad_island(model: Program, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        gate = model.frozen(b).sigmoid()
        gate[0].zero_()
    return a * gate


def grad_inside_no_grad(model: Program, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = b.exp().clamp_max(2)
        with torch.enable_grad():
            y = a.sin() * scale
        scale = scale.cos()
    return y * scale


def buffer_write(model: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a + model.count
    model.count.lerp_(b.detach().mean(0), 0.1)
    return y * model.count.clone()


def statistics_read(model: Program, a: Tensor, b: Tensor) -> Tensor:
    assert model.batch_norm.running_var is not None
    before = model.batch_norm.running_var.add(1).log()
    return model.batch_norm(a) * before + model.batch_norm.running_var.cos()


def python_branch(model: Program, a: Tensor, b: Tensor) -> Tensor:
    return (a * b).tanh() if model.steps % 2 else (a - b).sin()


def chunks(_: Program, a: Tensor, b: Tensor) -> Tensor:
    left, right = a.chunk(2, 1)
    return torch.cat([right * b[:, : right.shape[1]], left.exp().clamp_max(3)], 1)


def unsafe_split(_: Program, a: Tensor, b: Tensor) -> Tensor:
    left, right = (a * 1.0).unsafe_chunk(2, 1)
    opened = left.sigmoid_()
    right.tanh_()
    return torch.cat([opened * right, right], 1) * b


def conv(model: Program, a: Tensor, _: Tensor) -> Tensor:
    return model.conv(a.reshape(-1, 2, model.columns // 2)).view(model.rows, model.columns)


def images(model: Program, a: Tensor) -> Tensor:
    return a.reshape(1, model.rows, 2, model.columns // 2)


def pooled(model: Program, a: Tensor, b: Tensor) -> Tensor:
    y = F.max_pool2d(images(model, a).sin(), (1, 2))
    return F.interpolate(y, scale_factor=(1, 2), mode="nearest").reshape_as(a) + F.avg_pool2d(
        images(model, b), 1
    ).reshape_as(a)


def gru_cell(model: Program, a: Tensor, b: Tensor) -> Tensor:
    hidden = b
    for _ in range(2):
        hidden = model.gru_cell(a, hidden)
    return hidden


def lstm(model: Program, a: Tensor, b: Tensor) -> Tensor:
    return model.lstm(a.view(1, model.rows, model.columns))[0].view(model.rows, model.columns) * b


def rnn_loop(model: Program, a: Tensor, b: Tensor) -> Tensor:
    hidden, seen = b[0], []
    for row in a[:3]:
        hidden = (row + hidden * 0.5).tanh()
        seen.append(hidden)
    return torch.stack(seen).mean(0) * a


def attention(_: Program, a: Tensor, b: Tensor) -> Tensor:
    q, k, v = (t.reshape(1, 2, -1, t.shape[1] // 2) for t in (a, b.sin(), a * b))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2).reshape_as(a)


def complex_numbers(_: Program, a: Tensor, b: Tensor) -> Tensor:
    z = torch.view_as_complex(a.reshape(a.shape[0], -1, 2).contiguous())
    return torch.view_as_real((z * z.conj()).exp().sin() + z.imag.neg()).reshape_as(a) * b.sigmoid()


def fourier(_: Program, a: Tensor, b: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b).conj() * 0.1, n=a.shape[1])


def autocast(model: Program, a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.gelu(model.linears[1](a[:2]))
    return torch.cat([y.float(), b[2:]])


def gradient_penalty(model: Program, a: Tensor, b: Tensor) -> Tensor:
    x = b.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.linears[1](x).sin().sum(), x, create_graph=torch.is_grad_enabled())
    return a * slope


def hooked(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * 1.5
    if y.requires_grad:
        y.register_hook(lambda grad: None if grad is None else grad * 0.5)  # as PyTorch passes what is zero
    return y.sin() * b


def saved_on_cpu(_: Program, a: Tensor, b: Tensor) -> Tensor:
    with save_on_cpu():
        return a.sin().exp().clamp_max(3) * b


def own_hooks(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a.cos()
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = y.sin() * b
    return y.tanh()


def out_argument(_: Program, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        buffer = torch.empty_like(b)
        torch.sin(b, out=buffer)
        buffer.neg_()
    return a * buffer


def data_write(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * 1.0
    z = y.sin()  # saves y; plain silently reads what is written next
    y.data.mul_(0.5)
    return z * b + y.detach().cos()


def numpy_write(_: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * 1.0
    z = y.sin() * b
    y.detach().numpy()[0] = 0.25
    return z + y.exp().clamp_max(2)


def generated(_: Program, a: Tensor, b: Tensor) -> Tensor:
    def parts() -> Iterator[Tensor]:
        for row in a[:3]:
            yield (row * b).sin()

    return sum(parts())  # type: ignore[return-value]  # a sum of tensors is a tensor


def failed_attempt(model: Program, a: Tensor, b: Tensor) -> Tensor:
    try:
        model.linears[1](a.sin()[:, 1:])
    except RuntimeError:
        a = a.cos()
    return a * b


def recursive(model: Program, a: Tensor, b: Tensor) -> Tensor:
    if model.depth:
        return a * b
    model.depth += 1
    try:
        return model.again(a) + b
    finally:
        model.depth -= 1


def functional_call(model: Program, a: Tensor, b: Tensor) -> Tensor:
    weights = {name: p * 0.5 for name, p in model.linears[1].named_parameters()}
    return torch.func.functional_call(model.linears[1], weights, (a,)).sin() + b


def buffer_swap(model: Program, a: Tensor, b: Tensor) -> Tensor:
    y = a * model.swapped.sin()
    model.swapped = b.detach().mean(0) + 0.5
    return y + model.swapped


def data_dependent(_: Program, a: Tensor, b: Tensor) -> Tensor:
    chosen = a[a > 0].sin()
    return b * (1 + chosen.sum() * 0.01)


INSTRUCTIONS: dict[str, Instruction] = {
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
    "unsafe split": unsafe_split,
    "fresh in place": fresh_in_place,
    "views of views": views_of_views,
    "slices of zeros": slices_of_zeros,
    "index put in place": index_put_in_place,
    "index put": lambda m, a, b: a.index_put((torch.tensor([1, 0]),), b[:2].exp()).sin(),
    "masked": lambda m, a, b: a.masked_fill(b > 0.5, 0.1).masked_scatter(a > 1, b.exp().clamp_max(2)),
    "scatter": scatters,
    "in place": lambda m, a, b: a.mul_(0.9),  # plain autograd may refuse this; then so must the engine
    "relu in place": lambda m, a, b: F.relu((a + b), inplace=True),
    "activations in place": lambda m, a, b: F.elu_(a * b) * F.leaky_relu_(a + b) + (b * 2).clamp_(-1, 2).tanh(),
    "dropout": lambda m, a, b: F.dropout(a, 0.4),
    "dropout in place": lambda m, a, b: F.dropout(a * b, 0.4, inplace=True),
    "dropout2d": lambda m, a, b: F.dropout2d(images(m, a), 0.3).reshape_as(a),
    "alpha dropout": lambda m, a, b: F.rrelu(F.alpha_dropout(a, 0.2), training=True),
    "noise": lambda m, a, b: a * torch.rand_like(a),
    "bernoulli": lambda m, a, b: a * torch.empty_like(a).bernoulli_(0.5) + torch.randn(m.columns),
    "batch norm": lambda m, a, b: m.batch_norm(a),
    "batch norm in eval": lambda m, a, b: F.batch_norm(a, m.batch_norm.running_mean, m.batch_norm.running_var),
    "statistics": statistics_read,
    "group norm": lambda m, a, b: F.group_norm(a, 2) + F.layer_norm(b, (m.columns,)),
    "instance norm": lambda m, a, b: F.instance_norm(images(m, a)).reshape_as(a),
    "rms norm": lambda m, a, b: F.rms_norm(a, (m.columns,)) * b,
    "conv": conv,
    "pool": pooled,
    "block": lambda m, a, b: main_of(m.block(a, scale=0.7, form=m.form + m.steps)),
    "shared block": lambda m, a, b: m.parent(a, b),
    "gru cell": gru_cell,
    "lstm": lstm,
    "rnn loop": rnn_loop,
    "parametrised": lambda m, a, b: m.normed(a).sin(),
    "attention": attention,
    "einsum": lambda m, a, b: torch.einsum("ij,kj->ik", a, b).mean(1, keepdim=True) * a,
    "bilinear": lambda m, a, b: torch.addcmul(a, b.sin(), a.cos(), value=0.5).lerp(b, 0.3),
    "embedding": lambda m, a, b: F.embedding(b.detach().argmax(1), m.linears[0].weight) * a,
    "complex": complex_numbers,
    "fourier": fourier,
    "double": lambda m, a, b: (a.double().sin() * b.double()).float(),
    "bfloat16": lambda m, a, b: a.bfloat16().sin().exp().clamp_max(2).float() * b,
    "autocast": autocast,
    "detach": lambda m, a, b: a.detach() * b.sin(),
    "no grad": no_grad_island,
    "grad inside no grad": grad_inside_no_grad,
    "buffer": buffer_write,
    "swapped buffer": buffer_swap,
    "branch": python_branch,
    "cumsum": lambda m, a, b: a.cumsum(1).tanh(),
    "cumprod": lambda m, a, b: a.sigmoid().cumprod(1) + b.logcumsumexp(0).sin(),
    "sort": lambda m, a, b: a.sort(1)[0] * b,
    "top": lambda m, a, b: a.topk(2, 1)[0].sum(1, keepdim=True) * b + a.max(1, keepdim=True)[0],
    "norms": lambda m, a, b: a / (1 + a.norm(dim=1, keepdim=True)) + b.logsumexp(1, keepdim=True).sin(),
    "where": lambda m, a, b: torch.where(a > 0, a.exp().clamp_max(2), b),
    "reorder": lambda m, a, b: a.roll(1, 1).flip(0).tril() + F.pad(b[:, 1:], (0, 1)).sin(),
    "unfold": lambda m, a, b: a.unfold(1, 2, 2).prod(-1).repeat(1, 2) * b,
    "glu": lambda m, a, b: F.glu(torch.cat([a, b], 1)),
    "foreach": lambda m, a, b: torch._foreach_sin(torch._foreach_mul([a, b], [0.5, 2.0]))[1],
    "checkpoint": lambda m, a, b: checkpoint(lambda x: m.linears[1](x).sin() * b, a, use_reentrant=False),
    "custom function": lambda m, a, b: Cube.apply((a * 0.5).sin()),
    "two outputs": lambda m, a, b: TwoOutputs.apply(a.sin(), b)[m.form % 2],
    "marked dirty": lambda m, a, b: ScaleInPlace.apply(a.exp().clamp_max(2)).sin() * b,
    "raw kernel": lambda m, a, b: RawSine.apply(a).exp() * 0.1,
    "raw kernels that draw": lambda m, a, b: opaque_functions.Masked.apply((a * 0.5).tanh()) + b,
    "raw kernels that keep": lambda m, a, b: opaque_functions.Keeping.apply(a.sin(), b) * 0.5,
    "library operator": lambda m, a, b: opaque_functions.squash(a + b).exp() * 0.1,
    "library operator in place": opaque_functions.halved_in_place,
    "gradient penalty": gradient_penalty,
    "tensor hook": hooked,
    "save on cpu": saved_on_cpu,
    "own hooks": own_hooks,
    "out argument": out_argument,
    "data write": data_write,
    "numpy write": numpy_write,
    "vmap": lambda m, a, b: torch.vmap(lambda row: (row * b[0]).sin().cumsum(0))(a),
    "functional call": functional_call,
    "generator": generated,
    "failed attempt": failed_attempt,
    "recursive": recursive,
    "sparse": lambda m, a, b: torch.sparse.mm(torch.eye(m.rows).to_sparse(), a.sin()) * b,
    "data dependent": data_dependent,
}


def main_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple):
        return result[0]
    return result["y"] if isinstance(result, dict) else result.main
