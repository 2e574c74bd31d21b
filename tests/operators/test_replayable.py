"""What may not be replayed is kept, or refused with a clear error: never silently another gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.replay.helpers import PATH, assert_same, run
from tightfit.operators.facts import describe, draws
from tightfit.replay.contents import checksum, same_bits
from tightfit.replay.installed import Installed

Tensor = torch.Tensor


class RawKernel(torch.autograd.Function):
    """sin by NumPy, written behind the dispatcher's back into a buffer from `allocate`."""

    allocate: Callable[[Tensor], Tensor] = torch.empty_like

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = RawKernel.allocate(x)
        out.detach().numpy()[:] = np.sin(x.detach().numpy())
        doubled = out * 2
        ctx.save_for_backward(out, doubled)
        return doubled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        out, doubled = ctx.saved_tensors
        return grad * out * doubled


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        ctx.save_for_backward(x, square)
        return square * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]  # PyTorch's signature is wider
        x, square = ctx.saved_tensors
        return grad * 3 * square + 0 * x


# The first call of a region is its self-check, later ones rely on what it found: both must be right.
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("allocate", [torch.empty_like, torch.zeros_like, torch.ones_like])
def test_raw_kernel_into_a_fresh_buffer(allocate: Callable[[Tensor], Tensor], calls: int) -> None:
    RawKernel.allocate = allocate
    statistics = assert_same(lambda x, w: RawKernel.apply(x @ w).exp() @ w, calls=calls)
    assert statistics.dropped_slots > 0


def numpy_write_between_two_reads(x: Tensor, w: Tensor) -> Tensor:
    buffer = x.detach() * 2
    before = buffer.sin()
    buffer.numpy()[:] = 7
    return (x @ w) * before * buffer


def numpy_write_into_constants_between_two_reads(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros(8, 16)
    before = buffer.cos()
    buffer.numpy()[:] = 7
    return (x @ w) * before * buffer.cos()


def numpy_write_into_one_element(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros(4096, 16)
    buffer.numpy()[3000, 5] = 7
    return (x @ w) * buffer.sum() * buffer[3000]


def numpy_swap_of_two_elements(x: Tensor, w: Tensor) -> Tensor:
    buffer = (x @ w).detach()
    array = buffer.numpy()
    array[0, 0], array[0, 1] = float(array[0, 1]), float(array[0, 0])
    return (x @ w) * buffer


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(
    "function",
    [
        numpy_write_between_two_reads,
        numpy_write_into_constants_between_two_reads,
        numpy_write_into_one_element,
        numpy_swap_of_two_elements,
    ],
)
def test_hidden_write_inside_the_region(function: Callable[[Tensor, Tensor], Tensor], calls: int) -> None:
    assert_same(function, calls=calls)


def test_hidden_write_into_a_source_at_the_end_of_the_region_is_an_error() -> None:
    array = np.ones((1, 16), dtype=np.float32)

    def function(x: Tensor, w: Tensor) -> Tensor:
        array[:] = 1
        result = (x @ w) * torch.from_numpy(array).exp().sin()
        array[:] = 9
        return result

    assert run(function, replay=False).error is None
    assert "NumPy" in str(run(function, replay=True).error)


def test_hidden_write_into_a_source_after_the_region_is_an_error() -> None:
    array = np.ones((1, 16), dtype=np.float32)

    def function(x: Tensor, w: Tensor) -> Tensor:
        array[:] = 1
        return (x @ w) * torch.from_numpy(array).exp().sin()

    def after(y: Tensor) -> Tensor:
        array[:] = 9
        return y.sum()

    assert "NumPy" in str(run(function, replay=True, after=after).error)


def test_data_written_inside_the_region() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).sin()
        z = y.exp()
        doubled = z * 2
        y.data.mul_(3)  # before anything saved it: its later readers see the new contents
        return z.tanh() * doubled.cos() * y

    assert_same(function)


def test_saved_value_overwritten_is_refused_as_plain_refuses_it() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).sigmoid()  # saved by sigmoid
        z = y @ w
        y.add_(1)
        return z

    for replay in (False, True):
        assert isinstance(run(function, replay=replay).error, RuntimeError)


def test_saved_region_output_overwritten_outside_is_refused_as_plain_refuses_it() -> None:
    def after(y: Tensor) -> Tensor:
        return y.sigmoid().add_(1).sum() + y.mul_(3).sum()

    for replay in (False, True):
        assert run(lambda x, w: (x @ w).sin(), replay=replay, after=after).error is not None


@pytest.mark.parametrize("written", [False, True])
def test_source_written_after_the_region_is_an_error_not_another_gradient(written: bool) -> None:
    """Plain PyTorch has no use for the source any more; replay has."""
    offset = torch.ones(1, 16)

    def backward(loss: Tensor) -> None:
        if written:
            offset.add_(1)
        loss.backward()

    for replay in (False, True):
        offset.fill_(1)
        error = run(lambda x, w: (x + offset).exp() @ w, replay=replay, backward=backward).error
        if replay and written:
            assert "modified in place" in str(error)
        else:
            assert error is None


def test_source_written_inside_the_region_is_rebuilt_as_it_was() -> None:
    offset = torch.ones(16)

    def function(x: Tensor, w: Tensor) -> Tensor:
        offset.fill_(1.0)
        y = (x + offset).exp() @ w
        offset.add_(5)
        return y * offset.sin()

    assert_same(function)


@pytest.mark.parametrize("kind", ["direct", "layer norm", "linear"])
def test_parameter_written_before_backward_is_refused_as_plain_refuses_it(kind: str) -> None:
    weight = nn.Parameter(torch.ones(16))
    norm, linear = nn.LayerNorm(16), nn.Linear(16, 16)
    function, parameter = {
        "direct": (lambda x, w: (x @ w) * weight, weight),
        "layer norm": (lambda x, w: norm(x @ w), norm.weight),
        "linear": (lambda x, w: linear(x @ w), linear.weight),
    }[kind]

    def backward(loss: Tensor) -> None:
        with torch.no_grad():
            parameter.add_(1)
        loss.backward()

    for replay in (False, True):
        error = run(function, replay=replay, backward=backward).error
        assert "modified by an inplace operation" in str(error)


def test_in_place_on_the_region_s_input() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        x.mul_(2)
        return (x @ w).sin().mul_(x)

    assert_same(function)


def test_in_place_on_views() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).sin()
        y[:, :4].mul_(2)
        y.t()[3:5].exp_()
        return y.exp().chunk(2, 1)[1].tanh()

    assert_same(function, calls=2)


def test_parts_with_version_counters_of_their_own() -> None:
    """unsafe_chunk: autograd takes the parts for new tensors, so one is written while another is saved."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        gates = (x @ w).unsafe_chunk(2, 1)
        opened = gates[0].sigmoid_()  # saved
        gates[1].tanh_()  # the same storage
        return opened * gates[1]

    assert_same(function)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_networks(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    network = kind(16, 16, num_layers=2, dropout=0.3)
    assert_same(lambda x, w: network((x @ w).sin().view(8, 1, 16))[0].exp(), calls=2)


def test_uninitialised_memory_is_kept_unless_visibly_filled() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        mask = torch.empty(8, 16).bernoulli_(0.5)
        noise = torch.empty(8, 16).normal_()
        out = torch.empty(8, 16)
        with torch.no_grad():
            torch.sin(x, out=out)
        return (x @ w) * mask * noise * out

    statistics = assert_same(function, calls=2)
    assert statistics.replayed_ops > 0


def test_explicit_generators_and_their_state() -> None:
    generator = torch.Generator()

    def function(x: Tensor, w: Tensor) -> Tensor:
        generator.manual_seed(5)
        mask = torch.empty(8, 16).bernoulli_(0.5, generator=generator)
        return (x @ w) * mask * torch.rand(8, 16, generator=generator)

    states = []
    for replay in (False, True):
        assert run(function, replay=replay).error is None
        states.append(generator.get_state())
    assert same_bits(*states)
    statistics = assert_same(function, calls=2)
    assert statistics.dropped_slots == 2


def test_python_and_numpy_randomness_in_forward() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        random.seed(3)
        rng = np.random.default_rng(3)
        noise = torch.from_numpy(rng.random((8, 16), dtype=np.float32))
        return ((x @ w).sin() * random.random() * noise.exp()).exp()

    assert_same(function, calls=2)


def test_two_draws_of_one_generator() -> None:
    assert_same(lambda x, w: (x @ w) * torch.rand_like(x) * torch.rand_like(x).sin())


def test_attention_draws_random_numbers_where_it_is_asked_for_dropout() -> None:
    attention = describe(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    tensors = (torch.ones(1, 1, 2, 2),) * 3
    assert not draws(attention, tensors, {})
    assert not draws(attention, (*tensors, 0.0, True), {})
    assert draws(attention, (*tensors, 0.1), {})
    assert draws(attention, tensors, {"dropout_p": 0.1})
    assert draws(describe(torch.ops.aten.native_dropout.default), (tensors[0], 0.0, True), {})
    assert not draws(describe(torch.ops.aten.mm.default), tensors[:2], {})


def test_dropout_masks() -> None:
    statistics = assert_same(lambda x, w: F.dropout(F.dropout(x @ w, 0.3).exp(), 0.5) @ w)
    assert statistics.replayed_ops >= 4


def test_sparse_arguments_are_kept() -> None:
    assert_same(lambda x, w: torch.sparse.mm(torch.eye(8).to_sparse(), (x @ w).sin()).exp(), calls=2)


def test_complex_and_lazy_bits() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        z = torch.view_as_complex((x @ w).sin().view(8, 8, 2))
        squared = (z * z.conj()).exp()
        return torch.view_as_real(squared).sum(-1) * z.imag.neg()

    assert_same(function)


def test_custom_autograd_function() -> None:
    statistics = assert_same(lambda x, w: Cube.apply((x @ w).sin()).exp(), calls=2)
    assert statistics.dropped_slots >= 3


@torch.library.custom_op("tightfit_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, grad: grad * 2)


def test_a_library_operator_is_replayed_once_it_gave_the_same_bits_twice() -> None:
    statistics = assert_same(lambda x, w: twice((x @ w).sin()).exp().sin(), calls=2)
    assert statistics.replayed_ops >= 4
    assert statistics.refused_ops == 0


def test_an_operation_outside_the_known_good_list_is_run_twice_and_trusted_or_refused() -> None:
    installed = Installed(recipes={})
    leaf = torch.randn(8, 16, requires_grad=True)
    with installed.region(PATH):
        leaf.cumsum(0).sin()
    assert "aten.cumsum.default" in installed.repeats.trusted
    assert not any(installed.refused.values())


def test_running_statistics_read_before_they_are_updated() -> None:
    norm = nn.BatchNorm1d(16)

    def function(x: Tensor, w: Tensor) -> Tensor:
        scale = norm.running_var.sqrt() + norm.running_mean.cos()
        return norm(x @ w) * scale

    def fresh(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w)

    norm.reset_running_stats()
    plain = run(fresh, replay=False)
    norm.reset_running_stats()
    replayed = run(fresh, replay=True)
    assert same_bits(plain.tensors["w.grad"], replayed.tensors["w.grad"])
    assert same_bits(plain.tensors["x.grad"], replayed.tensors["x.grad"])
    assert replayed.statistics is not None
    assert replayed.statistics.replayed_ops > 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.scaled_dot_product_attention(
            *[(x @ w).view(1, 4, 8, 4) * s for s in (1, 2, 3)], is_causal=True, dropout_p=0.3
        ).exp(),
        lambda x, w: (x @ w).index_put((torch.tensor([1, 2]),), x[:2].exp()).sort(-1)[0].topk(4)[0].exp(),
        lambda x, w: torch.where(x @ w > 0, (x @ w).exp(), x).cumsum(0).max(-1)[0].tanh(),
        lambda x, w: (x @ w)[x > 0].exp(),
        lambda x, w: torch.linalg.eigh((x @ w) @ (x @ w).t() + 8 * torch.eye(8))[0].exp(),
        lambda x, w: torch.fft.rfft(x @ w).abs().log1p(),
        lambda x, w: torch.cdist((x @ w).sin(), x).exp().neg().exp(),
        lambda x, w: F.interpolate((x @ w).view(1, 2, 8, 8).sin(), scale_factor=2, mode="bilinear").exp(),
        lambda x, w: F.grid_sample(
            (x @ w).view(1, 2, 8, 8).sin(), x.view(1, 8, 8, 2).tanh(), align_corners=False
        ).exp(),
        lambda x, w: sum(torch._foreach_mul([x @ w, x.sin()], 2.0)).exp(),
        lambda x, w: F.gumbel_softmax(F.rrelu(F.alpha_dropout(x @ w, 0.3, True), training=True), hard=True) * x.exp(),
        lambda x, w: (x @ w).sin().gather(1, torch.multinomial(x.detach().exp(), 3)).exp(),
        lambda x, w: (x @ w)[torch.randperm(8)].exp() * torch.randint(0, 5, (16,)),
        lambda x, w: (x @ w).sin().as_strided((8, 16), (8, 1)).exp(),
        lambda x, w: torch.cat([(x @ w)[:0].sin(), (x @ w).exp()]),
        lambda x, w: (x @ w) * (x.detach().exp().view(torch.int32) > 0).float().sin(),
        lambda x, w: torch.vmap(lambda row: (row @ w).sin().exp())(x),
        lambda x, w: (x.bfloat16() @ w.bfloat16()).sin().exp().float(),
        lambda x, w: F.embedding(torch.arange(8), w).sin() * F.layer_norm(x @ w, (16,)),
    ],
)
def test_wide_choice_of_operations(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert assert_same(function, calls=2).replayed_ops > 0


def test_checksum_sees_order_and_single_bits() -> None:
    for numel in (5, 61, 62, 1000):
        tensor = torch.arange(numel, dtype=torch.float32)
        swapped = tensor.clone()
        swapped[0], swapped[-1] = tensor[-1], tensor[0]
        neighbours = tensor.clone()
        neighbours[1], neighbours[2] = tensor[2], tensor[1]
        one_bit = tensor.clone()
        one_bit.view(torch.int32)[numel // 2] ^= 1
        seen = {checksum(t) for t in (tensor, swapped, neighbours, one_bit)}
        assert len(seen) == 4


def test_checksum_sees_words_exchanged_that_differ_in_their_highest_bits_only() -> None:
    """Floats that are powers of two: their differences times a distance are powers of two, and sums are modulo one."""
    words = 40_000
    for distance in (1, 2, 4, 61, 509, 512, 1018, 1024, 4096, 8192, 509 * 16, 512 * 61):
        for first in (0, 1, 777):
            tensor = torch.ones(words)
            tensor[first] = 2.0
            moved = torch.ones(words)
            moved[first + distance] = 2.0
            assert checksum(tensor) != checksum(moved), (distance, first)
            assert checksum(tensor[1:].clone()) != checksum(moved[1:].clone()) or first == 0


def test_same_bits_is_exact() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert same_bits(None, None)
    assert not same_bits(None, torch.zeros(1))


@pytest.mark.parametrize("self_check", [False, True])
def test_what_was_computed_from_statistics_before_batch_norm_moved_them_is_kept(self_check: bool) -> None:
    """BatchNorm writes running statistics with no mark and no version: `before` must not come from the new ones."""
    torch.manual_seed(0)
    x, start = torch.randn(8, 16), torch.randn(8, 16, requires_grad=True)
    weight = start.detach().clone().requires_grad_()

    def forward(w: Tensor) -> Tensor:
        mean, var = torch.zeros(16) + 2.0, torch.ones(16) * 3.0
        before = mean.exp()
        y = torch.nn.functional.batch_norm(x * w, mean, var, training=True)
        return (y * before).sin().sum()

    forward(start).backward()
    with Installed(recipes={}, self_check=self_check).region("r"):
        loss = forward(weight)
    loss.backward()
    assert start.grad is not None
    assert weight.grad is not None
    assert torch.equal(start.grad, weight.grad)
