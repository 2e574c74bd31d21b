"""Models that call `torch.utils.checkpoint` by themselves: a plan decides instead, with the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as pytorch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import tightfit
from tests.promises.training import seed_everything, sgd, snapshot
from tests.replay.further_instructions import compiled, writes_its_input
from tests.support.wide_block import WIDTH, WideBlock
from tightfit.device import memory as meter
from tightfit.errors import BudgetInfeasible
from tightfit.records import Profile

BATCH = torch.randn(4, 24, WIDTH, generator=torch.Generator().manual_seed(1))

Run = Callable[..., Any]


class Block(WideBlock):
    """With dropout, so that the random state has to be that of forward."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.narrow(F.dropout(F.gelu(self.widen(self.norm(x))), 0.1))


class Net(nn.Module):
    """A stem and blocks; `run` calls each block."""

    def __init__(self, run: Run | None = None, count: int = 6, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.run = run or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x)
        return x


class Sequence(Net):
    """Blocks that are checkpointed several at a time."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(nn.Sequential(*self.blocks), 3, self.stem(x), use_reentrant=self.reentrant)


class Nested(Net):
    """Checkpoints inside checkpoints."""

    def several(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first in range(0, len(self.blocks), 3):
            x = checkpoint(self.several, self.blocks[first : first + 3], x, use_reentrant=False)
        return x


class Functions(nn.Module):
    """No module for each block: functions of weights that are in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ParameterList(torch.randn(WIDTH, 4 * WIDTH) * 0.1 for _ in range(6))
        self.narrow = nn.ParameterList(torch.randn(4 * WIDTH, WIDTH) * 0.1 for _ in range(6))

    def block(self, x: Tensor, index: int) -> Tensor:
        return x + F.dropout(F.gelu(F.layer_norm(x, (WIDTH,)) @ self.wide[index]), 0.1) @ self.narrow[index]

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self.wide)):
            x = checkpoint(self.block, x, index, use_reentrant=False)
        return x


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def reentrantly(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, 0.5, use_reentrant=True)


def by_choice(block: nn.Module, x: Tensor) -> Tensor:
    policy = {torch.ops.aten.addmm.default: pytorch.CheckpointPolicy.MUST_SAVE}

    def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> pytorch.CheckpointPolicy:
        return policy.get(op, pytorch.CheckpointPolicy.PREFER_RECOMPUTE)

    contexts = lambda: pytorch.create_selective_checkpoint_contexts(choose)  # noqa: E731  # as users write it
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "each block": lambda: Net(plainly),
    "reentrant": lambda: Net(reentrantly),
    "selective": lambda: Net(by_choice),
    "sequential": lambda: Sequence(reentrant=False),
    "sequential, reentrant": lambda: Sequence(reentrant=True),
    "nested": Nested,
    "functions": Functions,
}
#: One of each of PyTorch's mechanisms; the others are exhaustive.
QUICK_KINDS = ("reentrant", "selective", "nested")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    seed_everything()
    return kind()


def trained(model: nn.Module, loss: Callable[..., Tensor], steps: int = 2) -> tuple[list[Any], int]:
    """Snapshots after each step, and the highest peak."""
    optimizer = sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    seed_everything(1)
    found, highest = [], 0
    for _ in range(steps):

        def step() -> Tensor:
            value = loss(model, BATCH)
            value.backward()
            return value

        resident = meter.resident_bytes(model, BATCH, optimizer)
        value, peak_bytes = meter.measure_peak(step, resident)
        highest = max(highest, peak_bytes)
        found.append(snapshot(model, value))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return found, highest


def assert_equal(first: list[Any], second: list[Any]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
            assert same, name


def smallest_budget(profile: Profile) -> int:
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.solve(profile, budget_bytes=1)
    return caught.value.required_bytes


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK_KINDS else pytest.mark.exhaustive) for kind in KINDS]
)
@pytest.mark.slow
def test_budgets_between_all_and_nothing_with_the_models_own_bits(kind: str) -> None:
    own, own_peak_bytes = trained(made(KINDS[kind]), loss_of)
    model = made(KINDS[kind])
    profile = tightfit.measure(model, BATCH, loss=loss_of, optimizer=sgd(model))
    assert set(profile.checkpoints.values()) == {""}
    smallest_bytes = smallest_budget(profile)
    assert smallest_bytes <= own_peak_bytes
    keeps_all = tightfit.solve(profile, budget_bytes=2**40)
    middle_bytes = (own_peak_bytes + keeps_all.predicted_peak_bytes) // 2
    overheads = []
    for budget_bytes in (smallest_bytes, own_peak_bytes, middle_bytes):
        model = made(KINDS[kind])
        applied = tightfit.fit(
            model, BATCH, budget=budget_bytes, loss=loss_of, optimizer=sgd(model), reference_budget_bytes=2**40
        )
        assert applied.verdict is not None
        assert applied.verdict.ok, applied.verdict.differing
        planned, peak_bytes = trained(model, applied.loss)
        assert peak_bytes <= budget_bytes
        assert applied.statistics.mismatches == applied.statistics.unplanned_calls == 0
        assert_equal(own, planned)
        overheads.append(applied.plan.overhead_ratio)
        applied.remove()
    assert overheads == sorted(overheads, reverse=True)


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        Counting.calls += 1
        return super().forward(x, scale)


@pytest.mark.parametrize("run", [plainly, reentrantly])
def test_where_memory_is_ample_nothing_runs_twice(run: Run) -> None:
    model = made(lambda: Net(run, count=3, block=Counting))
    with tightfit.fit(model, BATCH, budget="1GiB", loss=loss_of) as applied:
        Counting.calls = 0
        applied.loss(model, BATCH).backward()
        assert Counting.calls == 3
        with applied.paused():
            loss_of(model, BATCH).backward()
        assert Counting.calls == 9
    loss_of(model, BATCH).backward()
    assert Counting.calls == 15


def left_alone(model: nn.Module, batch: Tensor = BATCH, **options: Any) -> str:
    """The reason for which the one checkpointed function of a model is left to PyTorch, in a plan with its bits."""
    plan = tightfit.fit(model, batch, loss=loss_of, reference_budget_bytes=2**40, grad_checkpoint="full", **options)
    assert plan.verdict is not None
    assert plan.verdict.ok
    plan.remove()
    (reason,) = plan.plan.checkpoints.values()
    return reason


class Normalised(Block):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(24)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(self.statistics(x), scale)


def test_statistics_that_checkpointing_moves_twice_are_moved_twice() -> None:
    assert "changes what it did not make" in left_alone(Net(plainly, count=2, block=Normalised))


class Later(nn.Module):
    """Runs `order`, which checkpoints something and writes something else before the loss."""

    def __init__(self, order: Callable[[Later, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.side, self.inner = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return self.order(self, self.stem(x), self.side(x).sin()).sin()

    def checkpointed(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Saves its result if there is no other tensor; else it saves the other one's `tanh`."""

        def function(x: Tensor) -> Tensor:
            y = self.inner(x).tanh()
            return y if other is None else y.sin() * other.tanh()

        return checkpoint(function, x, use_reentrant=False)


def what_it_saves_is_written(model: Later, x: Tensor, other: Tensor) -> Tensor:
    return checkpoint(lambda x: model.inner(x) * other, x, use_reentrant=False) + other.mul_(0.9)


def what_it_reads_is_written(model: Later, x: Tensor, other: Tensor) -> Tensor:
    return model.checkpointed(x, other) + other.mul_(0.9)


def its_argument_is_written_through_data(model: Later, x: Tensor, other: Tensor) -> Tensor:
    y = checkpoint(lambda x, other: model.inner(x) * other.tanh(), x, other, use_reentrant=True)
    other.data.mul_(0.9)
    return y + other


def a_buffer_is_moved(model: Later, x: Tensor, other: Tensor) -> Tensor:
    y = model.checkpointed(x, model.scale)
    model.scale.lerp_(other.detach().mean((0, 1)), 0.1)
    return y


def a_constant_is_written(model: Later, x: Tensor, other: Tensor) -> Tensor:
    constant = torch.tensor([0.5] * WIDTH)
    y = model.checkpointed(x, constant)
    return y + constant.mul_(0.9)


def a_weight_is_written(model: Later, x: Tensor, other: Tensor) -> Tensor:
    y = model.checkpointed(x)
    model.inner.weight.data.mul_(0.9)
    return y


def its_result_is_written(model: Later, x: Tensor, other: Tensor) -> Tensor:
    return model.checkpointed(x).mul_(0.5)


def memory_was_handed_out_before(model: Later, x: Tensor, other: Tensor) -> Tensor:
    constant = other.detach().clone()
    memory = constant.numpy()
    y = model.checkpointed(x, constant)
    memory[:] = 0.25
    return y


def a_backward_inside_forward_is_over(model: Later, x: Tensor, other: Tensor) -> Tensor:
    copy = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.checkpointed(copy, other).sum(), copy, create_graph=True)
    return slope + other.mul_(0.9)


def a_compiled_function_writes_its_input(model: Later, x: Tensor, other: Tensor) -> Tensor:
    copy = other.detach().clone()
    y = model.checkpointed(x, copy)
    return y + compiled(writes_its_input, "aot_eager")(copy, model.scale)


ORDERS = (
    what_it_saves_is_written, what_it_reads_is_written, its_argument_is_written_through_data, a_buffer_is_moved,
    a_constant_is_written, a_weight_is_written, its_result_is_written, memory_was_handed_out_before,
    a_backward_inside_forward_is_over, a_compiled_function_writes_its_input,
)  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_what_is_written_later_is_read_anew(order: Callable[[Later, Tensor, Tensor], Tensor]) -> None:
    assert "written after it" in left_alone(made(lambda: Later(order)))


@pytest.mark.parametrize("inner_is_left", [False, True])
def test_what_an_inner_checkpoint_reads_its_outer_one_makes_anew(inner_is_left: bool) -> None:
    contexts = {"context_fn": lambda: (nullcontext(), nullcontext())} if inner_is_left else {}

    def order(model: Later, x: Tensor, other: Tensor) -> Tensor:
        def outer(x: Tensor) -> tuple[Tensor, Tensor]:
            made = model.inner(x)
            return checkpoint(lambda x: x.sin() * made.tanh(), x, use_reentrant=False, **contexts), made

        y, made = checkpoint(outer, x, use_reentrant=False)
        made.data.mul_(0.5)
        return y + made

    model = made(lambda: Later(order))
    with tightfit.fit(model, BATCH, loss=loss_of, reference_budget_bytes=2**40, grad_checkpoint="full") as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        (reason,) = (why for path, why in applied.plan.checkpoints.items() if path.endswith("outer>"))
        assert "written after it" in reason


def test_writes_that_nothing_reads_anew_leave_the_choice_to_the_plan() -> None:
    def order(model: Later, x: Tensor, other: Tensor) -> Tensor:
        def outer(x: Tensor) -> Tensor:
            sum_of = torch.tensor([0.5] * WIDTH)
            sum_of += 1
            return (model.checkpointed(x, other) * sum_of).mul_(0.5) + x

        return checkpoint(outer, x, use_reentrant=False).mul_(0.9)

    assert set(tightfit.measure(made(lambda: Later(order)), BATCH, loss=loss_of).checkpoints.values()) == {""}


def test_random_numbers_that_are_drawn_anew_are_drawn_anew() -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)

    model = Net(run, count=2)
    profile = tightfit.measure(model, BATCH, loss=loss_of)
    assert ["preserve_rng_state=False" in reason for reason in profile.checkpoints.values()] == [True]
    model = Net(run, count=2, block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)))
    assert set(tightfit.measure(model, BATCH, loss=loss_of).checkpoints.values()) == {""}


def test_contexts_of_the_models_own_are_entered() -> None:
    entered: list[int] = []

    class Context:
        def __enter__(self) -> None:
            entered.append(1)

        def __exit__(self, *error: object) -> None:
            pass

    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (Context(), Context()))

    assert "context_fn" in left_alone(Net(run, count=2))
    assert entered


def test_the_reentrant_form_with_weights_that_others_use_adds_gradients_in_its_own_order() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__(reentrantly, count=3)
            for block in self.blocks:
                block.widen = self.blocks[0].widen

    assert "another order" in left_alone(Shared())


def test_the_reentrant_form_without_a_gradient_to_its_arguments_trains_nothing() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__(reentrantly, count=2)
            self.stem.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            with pytest.warns(UserWarning, match="requires_grad=True"):
                return super().forward(x) + self.scale

    model = Frozen()
    model.scale = nn.Parameter(torch.ones(1))
    assert "none of its arguments requires a gradient" in left_alone(model)
    assert model.blocks[0].widen.weight.grad is None


def test_the_reentrant_form_gives_zeros_where_a_result_gets_no_gradient() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            used, _ = torch._foreach_mul([x, checkpoint(self.side, x, use_reentrant=True)], 2.0)
            return used

    assert "its weights zeros" in left_alone(made(Unused))


def test_inside_an_excluded_module_the_model_checkpoints_itself() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Net(plainly, count=2))
    assert "excluded" in left_alone(model, exclude="1")


def test_an_argument_that_several_uses_add_gradients_to_is_summed_as_the_reentrant_form_does() -> None:
    """Inside, three gradients come together; two more come from outside."""

    def several(a: Tensor, b: Tensor) -> Tensor:
        return a.sin() * b + (a * 1.7).cos() + a.tanh() * 0.3 + (b * a).exp().clamp(max=3.0)

    class Net3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = checkpoint(several, x, x * 0.5, use_reentrant=True)
            return y + x.sigmoid() * (x * 1.3).sin()

    own, _ = trained(made(Net3), loss_of)
    model = made(Net3)
    with tightfit.fit(model, BATCH, loss=loss_of, optimizer=sgd(model), grad_checkpoint="full") as applied:
        assert set(applied.plan.checkpoints.values()) == {""}
        planned, _ = trained(model, applied.loss)
    assert_equal(own, planned)


def test_a_tensor_that_the_reentrant_form_is_given_twice_gets_its_gradients_in_that_order() -> None:
    def inner(x: Tensor, y: Tensor) -> Tensor:
        return x.sin() * y.exp().clamp_max(2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return checkpoint(inner, y, y, use_reentrant=True) * y.cos()

    plain, _ = trained(made(Twice), loss_of)
    model = made(Twice)
    step = tightfit.Step(loss=loss_of, optimizer=sgd(model))
    profile = tightfit.measure(model, BATCH, step=step)
    assert set(profile.checkpoints.values()) == {""}
    with tightfit.apply(model, tightfit.solve(profile, smallest_budget(profile)), step=step) as applied:
        planned, _ = trained(model, applied.loss)
    assert_equal(plain, planned)


def test_pytorchs_functions_are_its_own_outside_and_in_other_threads() -> None:
    before = dict(vars(pytorch))
    counts: list[int] = []

    def other_code() -> None:
        block = Counting()
        x = torch.randn(2, WIDTH, requires_grad=True)
        Counting.calls = 0
        checkpoint(block, x, use_reentrant=False).sum().backward()
        checkpoint(block, x, use_reentrant=True).sum().backward()
        counts.append(Counting.calls)

    class Waiting(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            if planned:
                thread = threading.Thread(target=other_code)
                thread.start()
                thread.join()
            return super().forward(x, scale)

    planned = False
    model = made(lambda: Net(plainly, count=1, block=Waiting))
    with tightfit.fit(model, BATCH, budget="1GiB", loss=loss_of) as applied:
        planned = True
        applied.loss(model, BATCH)
    assert counts == [4]
    assert dict(vars(pytorch)) == before


def test_a_checkpointed_function_that_fails_ends_its_region() -> None:
    class Failing(Functions):
        fails = False

        def block(self, x: Tensor, index: int) -> Tensor:
            if self.fails and index == 2:
                raise KeyError("on purpose")
            return super().block(x, index)

    model = made(Failing)
    with tightfit.fit(model, BATCH, loss=loss_of, grad_checkpoint="full", reference_budget_bytes=2**40) as applied:
        model.fails = True
        with pytest.raises(KeyError, match="on purpose"):
            applied.loss(model, BATCH)
        assert not applied.is_running
        model.fails = False
        applied.statistics.reset()
        applied.loss(model, BATCH).backward()
        assert applied.statistics.mismatches == applied.statistics.unplanned_calls == 0


def llama(**options: Any) -> tuple[nn.Module, Tensor]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), torch.randint(0, 64, (2, 24))


def t5(**options: Any) -> tuple[nn.Module, Tensor]:
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), torch.randint(0, 64, (2, 24))


def bert(**options: Any) -> tuple[nn.Module, Tensor]:
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    return transformers.BertForMaskedLM(config), torch.randint(0, 64, (2, 24))


QUICK_MODELS = ((llama, True),)


@pytest.mark.parametrize(
    ("make", "reentrant"),
    [
        pytest.param(make, reentrant, marks=() if (make, reentrant) in QUICK_MODELS else pytest.mark.exhaustive)
        for make in (llama, t5, bert)
        for reentrant in (False, True)
    ],
)
@pytest.mark.slow
def test_transformers_models_with_gradient_checkpointing_enabled(
    make: Callable[[], tuple[nn.Module, Tensor]], reentrant: bool
) -> None:
    def words_loss(model: nn.Module, ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    seed_everything()
    model, ids = make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    resident = meter.resident_bytes(model, ids)
    _, own_peak_bytes = meter.measure_peak(lambda: words_loss(model, ids).backward(), resident)
    for parameter in model.parameters():
        parameter.grad = None
    applied = tightfit.fit(model, ids, budget=own_peak_bytes, loss=words_loss, reference_budget_bytes=2**40)
    assert applied.verdict is not None
    assert applied.verdict.ok, applied.verdict.differing
    assert applied.verdict.measured_peak_bytes <= own_peak_bytes
    assert applied.plan.checkpoints
    if not (reentrant and make is t5):  # its layers share what the decoder attends to, and the bias of positions
        assert set(applied.plan.checkpoints.values()) == {""}


class Clip(torch.autograd.Function):
    """A kernel that the dispatcher does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out.numpy()[...] = x.detach().numpy().clip(-1.5, 1.5)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return gradients[0] * (out.abs() < 1.5)


class OpaqueFunctions(Functions):
    def block(self, x: Tensor, index: int) -> Tensor:
        for _ in range(3):
            x = x + Clip.apply(F.layer_norm(x, (WIDTH,)) @ self.wide[index]) @ self.narrow[index]
        return x


def test_no_model_needs_more_than_it_does_by_itself() -> None:
    """Here no plan of tightfit's own gets as low: what an opaque function saves is kept, outside of any module."""
    own, own_peak_bytes = trained(made(OpaqueFunctions), loss_of)
    model = made(OpaqueFunctions)
    applied = tightfit.fit(
        model, BATCH, budget=own_peak_bytes, loss=loss_of, optimizer=sgd(model), reference_budget_bytes=2**40
    )
    planned, peak_bytes = trained(model, applied.loss)
    assert peak_bytes <= own_peak_bytes
    assert_equal(own, planned)
    applied.remove()
