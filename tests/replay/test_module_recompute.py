"""Modules whose whole forward runs again in backward: equal bits and the predicted peak, or the tape instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import tightfit
from tests.replay.helpers import differences, snapshot
from tightfit import Plan, Profile, UnsupportedInput
from tightfit._torch_private.modules import modules_in
from tightfit.device import memory as meter
from tightfit.errors import PromiseWarning
from tightfit.operators import pure_modules
from tightfit.operators.pure_modules import allow_recompute, can_call_again
from tightfit.profiling.mechanism_cost import Overhead
from tightfit.records import Decision
from tightfit.replay.executors.module_state import NO_MOVES, ModuleState
from tightfit.replay.statistics import Statistics
from tightfit.simulation.levers.module import can_recompute_module
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.plan_builder import build_plan
from tightfit.train.models.gpt import Gpt, GptConfig

Tensor = torch.Tensor


class Net(nn.Module):
    """Blocks between a stem and a head."""

    def __init__(self, block: Callable[[], nn.Module], width: int = 32, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def feed_forward(width: int = 32, dropout: float = 0.2) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
    )


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    result = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return result if isinstance(result, Tensor) and not result.dim() else getattr(result, "loss", result).pow(2).mean()


def batch() -> Tensor:
    return torch.randn(16, 24, 32, generator=torch.Generator().manual_seed(1))


def recompute_all(profile: Profile) -> Plan:
    """A plan that recomputes every module that may be."""
    index = ProfileIndex(profile)
    decisions = [
        Decision("module") if can_recompute_module(index, region) else None for region in range(len(profile.regions))
    ]
    return build_plan(index, decisions, 2**40)


def planned_regions(plan: Plan) -> list[str]:
    return [region.key for region in plan.regions if region.recipe >= 0]


@contextmanager
def applied_to(model: nn.Module, data: Any, plan: Plan | None = None) -> Iterator[tightfit.Applied]:
    plan = plan or recompute_all(tightfit.measure(model, data, loss=loss_of))
    assert planned_regions(plan), "nothing may be run again"
    with tightfit.apply(model, plan) as applied:
        yield applied


def step(model: nn.Module, data: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, data)
    loss.backward()
    return {**snapshot(model, loss), "random state": torch.get_rng_state()}


def assert_same(model: nn.Module, data: Any, plan: Plan | None = None) -> Statistics:
    plain = step(model, data)
    with applied_to(model, data, plan) as applied:
        planned = step(model, data)
    assert not differences(plain, planned)
    return applied.statistics


def test_blocks_run_again_once_each_and_every_bit_is_equal() -> None:
    statistics = assert_same(Net(feed_forward), batch())
    assert statistics.recomputed_calls == 3
    assert statistics.taped_ops == 0
    assert statistics.mismatches == statistics.unplanned_calls == 0


def test_the_peak_is_the_predicted_one() -> None:
    model, data = Net(feed_forward, count=4), batch()
    plain = tightfit.measure(model, data, loss=loss_of)
    plan = recompute_all(plain)
    assert plan.predicted_peak_bytes < plan.plain_peak_bytes
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with tightfit.apply(model, plan):
        _, peak_bytes = meter.measure_peak(lambda: loss_of(model, data).backward(), meter.resident_bytes(model, data))
    # What a node has read goes when the node is done, just before its bias' gradient is summed up (see `ModuleModel`).
    bias_bytes = 32 * 4
    assert peak_bytes == plan.predicted_peak_bytes - bias_bytes


class Reversible(torch.autograd.Function):
    """Runs its modules in backward, and there saves again what it had saved in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: nn.Module, *_: Tensor) -> Tensor:
        with torch.no_grad():
            y = x + function(x)
        ctx.function = function
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            z = ctx.function(y)
        torch.autograd.backward(z, gradients[0])
        return (gradients[0] + y.grad, None) + (None,) * len(list(ctx.function.parameters()))


class ReversibleBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.function = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Reversible.apply(x, self.function, *self.function.parameters())
        return result


def test_what_a_backward_inside_backward_saves_of_the_second_call_is_held() -> None:
    model, data = Net(ReversibleBlock), batch()
    plan = recompute_all(tightfit.measure(model, data, loss=loss_of))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with applied_to(model, data, plan) as applied:
        _, peak_bytes = meter.measure_peak(lambda: loss_of(model, data).backward(), meter.resident_bytes(model, data))
        assert applied.statistics.recomputed_calls == 3
    assert peak_bytes <= plan.predicted_peak_bytes


def test_nothing_is_held_of_a_forward_without_backward() -> None:
    model, data = Net(feed_forward), batch()
    with applied_to(model, data):
        before = meter.resident_bytes(model, data)
        _, peak_bytes = meter.measure_peak(lambda: loss_of(model, data), before)
        _, again_bytes = meter.measure_peak(lambda: loss_of(model, data), before)
    assert peak_bytes == again_bytes


@pytest.mark.parametrize("name", ["bert", "convnext", "gpt", "gpt2", "llama", "t5", "vit"])
def test_blocks_of_common_transformers(name: str) -> None:
    model, data, blocks = transformer(name)
    statistics = assert_same(model, data)
    assert statistics.recomputed_calls >= blocks


def transformer(name: str) -> tuple[nn.Module, Any, int]:
    """A tiny model, a batch, and how many blocks it has."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (2, 12))
    words = {"input_ids": tokens, "labels": tokens.clone()}
    if name == "gpt":
        sizes = GptConfig(vocabulary_size=64, sequence_length=12, width=16, layers=2, heads=2, dropout=0.1)
        return Gpt(sizes).train(), tokens, 2
    import transformers as hf

    if name == "llama":
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, use_cache=False,
            )
        )  # fmt: skip
    elif name == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0,
                eos_token_id=1,
            )
        )  # fmt: skip
    elif name == "bert":
        model = hf.BertForMaskedLM(
            hf.BertConfig(
                vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=16,
            )
        )  # fmt: skip
    elif name == "t5":
        model = hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
                use_cache=False,
            )
        )  # fmt: skip
    else:
        pictures = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
        if name == "vit":
            sizes = hf.ViTConfig(
                image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, hidden_dropout_prob=0.1,
            )  # fmt: skip
            return hf.ViTForImageClassification(sizes).train(), pictures, 2
        sizes = hf.ConvNextConfig(
            image_size=16, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], drop_path_rate=0.2
        )
        return hf.ConvNextForImageClassification(sizes).train(), pictures, 4
    return model.train(), words, 2


def test_a_cache_that_forward_fills_is_not_filled_twice() -> None:
    import transformers as hf

    model, data, _ = transformer("llama")
    model.config.use_cache = True
    plain = tightfit.measure(model, data, loss=loss_of)
    index = ProfileIndex(plain)
    keys = [r.key for place, r in enumerate(plain.regions) if can_recompute_module(index, place)]
    assert not any("layers" in key for key in keys), "a cache is among the arguments"
    modules = list(model.model.layers[0].modules())
    assert not can_call_again(modules, (torch.ones(1, 2, 16),), {"past_key_values": hf.DynamicCache()})


# ------------------------------------------------------------------------------------------- what takes the tape


class Pure(nn.Module):
    """Pure, but only its author knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.linear(x).tanh() * 2).sigmoid()


def test_the_user_may_allow_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pure_modules, "_pure", set(pure_modules._pure))
    allow_recompute(Pure)
    assert assert_same(Net(Pure), batch()).recomputed_calls == 3


def test_only_classes_of_modules_can_be_allowed() -> None:
    with pytest.raises(UnsupportedInput, match=r"allow_recompute\(MyBlock\)"):
        allow_recompute(Net(feed_forward))  # type: ignore[arg-type]  # the mistake that is told


class WritesItsArgument(Pure):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mul_(2)).tanh() * 2 + x


class Later(nn.Module):
    """The blocks' input is written after they have used it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pure() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.blocks[0](x) + self.blocks[1](x)
        x.add_(1)
        return y + x


def test_a_block_that_writes_its_argument_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pure_modules, "_pure", set(pure_modules._pure))
    allow_recompute(WritesItsArgument, Pure)
    for model in (Net(WritesItsArgument), Later()):
        profile = tightfit.measure(model, batch(), loss=loss_of)
        index = ProfileIndex(profile)
        assert any(region.module_recomputable for region in profile.regions)  # as far as kinds and arguments go
        assert not any(can_recompute_module(index, region) for region in range(len(profile.regions)))


def hook_on_a_part(model: Net) -> None:
    model.blocks[1][1].register_forward_hook(lambda *_: None)


def forward_of_a_part(model: Net) -> None:
    part = model.blocks[1][1]
    part.forward = part.forward


@pytest.mark.parametrize("change", [hook_on_a_part, forward_of_a_part])
def test_what_changed_after_planning_takes_the_tape(change: Callable[[Net], None]) -> None:
    model, data = Net(feed_forward), batch()
    plan = recompute_all(tightfit.measure(model, data, loss=loss_of))
    with tightfit.apply(model, plan) as applied:
        change(model)
        planned = step(model, data)
    assert applied.statistics.recomputed_calls == 2
    assert applied.statistics.unplanned_calls == 1
    assert applied.statistics.taped_ops > 0
    assert not differences(step(model, data), planned)


@pytest.mark.parametrize("shared", [False, True], ids=["", "weights that are found cast"])
def test_autocast_is_that_of_forward(shared: bool) -> None:
    """In forward a weight may be found cast, which backward casts anew."""
    model, data = Net(feed_forward), batch()
    if shared:
        for block in model.blocks:
            block[1] = model.blocks[0][1]
    plan = recompute_all(tightfit.measure(model, data, loss=loss_of, autocast=torch.bfloat16))
    with tightfit.apply(model, plan) as applied:
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(3)
            loss = loss_of(model, data)
        loss.backward()
        planned = snapshot(model, loss)
        assert applied.statistics.recomputed_calls == len(planned_regions(plan)) >= 3
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        loss = loss_of(model, data)
    loss.backward()
    assert not differences(snapshot(model, loss), planned)


def test_a_checkpoint_of_the_user_around_it_stays_in_charge() -> None:
    from torch.utils.checkpoint import checkpoint

    model, data = Net(feed_forward), batch()

    def checkpointed() -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        loss = checkpoint(lambda x: loss_of(model, x), data, use_reentrant=False)
        loss.backward()
        return snapshot(model, loss)

    plain = checkpointed()
    with applied_to(model, data):
        with pytest.warns(PromiseWarning, match=r"torch\.utils\.checkpoint"):
            planned = checkpointed()
        assert not differences(plain, planned)


# ----------------------------------------------------------------------------- between forward and backward


def written_in_place(model: Net) -> None:
    with torch.no_grad():
        model.blocks[1][0].bias.add_(1)  # plain autograd does not look at a norm's bias


def given_other_memory(model: Net) -> None:
    model.blocks[1][1].weight.data = model.blocks[1][1].weight.data * 2


@pytest.mark.parametrize("change", [written_in_place, given_other_memory])
def test_a_change_before_backward_is_an_error_and_never_a_wrong_gradient(change: Callable[[Net], None]) -> None:
    model, data = Net(feed_forward), batch()
    with applied_to(model, data):
        loss = loss_of(model, data)
        change(model)
        with pytest.raises(RuntimeError, match="tightfit cannot rebuild"):
            loss.backward()


def test_backward_twice_through_one_graph() -> None:
    model, data = Net(feed_forward), batch()

    def twice() -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, data)
        loss.backward(retain_graph=True)
        torch.rand(5)  # the second run has its own random numbers all the same
        loss.backward()
        return snapshot(model, loss)

    plain = twice()
    with applied_to(model, data) as applied:
        assert not differences(plain, twice())
    assert applied.statistics.recomputed_calls == 6


def test_gradients_of_gradients() -> None:
    model, data = Net(lambda: feed_forward(dropout=0.0)), batch()

    def penalty() -> dict[str, Tensor | None]:
        model.zero_grad(set_to_none=True)
        x = data.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        loss = slope.pow(2).mean()
        loss.backward()
        return snapshot(model, loss)

    plain = penalty()
    with applied_to(model, data):
        assert not differences(plain, penalty())


@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
def test_other_weights_for_one_call(kind: type[Tensor]) -> None:
    """`functional_call`: when backward comes, the module has its own weights again."""
    model, data = Net(lambda: feed_forward(dropout=0.0)), batch()
    plan = recompute_all(tightfit.measure(model, data, loss=loss_of))

    def with_others() -> dict[str, Tensor | None]:
        model.zero_grad(set_to_none=True)
        others = {name: (weight * 1.5 + 0.1) for name, weight in model.named_parameters()}
        if kind is nn.Parameter:
            others = {name: nn.Parameter(weight.detach()) for name, weight in others.items()}
        loss = functional_call(model, others, (data,)).pow(2).mean()
        loss.backward()
        return snapshot(model, loss) | {f"gradient of other {name}": other.grad for name, other in others.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients of what is no leaf
        plain = with_others()
        with applied_to(model, data, plan) as applied:
            assert not differences(plain, with_others())
    assert applied.statistics.recomputed_calls == (3 if kind is nn.Parameter else 0)


def test_the_loss_inside_a_step_with_its_backward() -> None:
    model, data = Net(feed_forward), batch()
    plain = step(model, data)
    with applied_to(model, data) as applied:
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        with applied.step():
            loss = loss_of(model, data)
            loss.backward()
        planned = {**snapshot(model, loss), "random state": torch.get_rng_state()}
    assert not differences(plain, planned)
    assert applied.statistics.recomputed_calls == 3


def test_a_plan_survives_its_file(tmp_path: Any) -> None:
    model, data = Net(feed_forward), batch()
    profile = tightfit.measure(model, data, loss=loss_of)
    recompute_all(profile).save(tmp_path / "plan.json")
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert assert_same(model, data, Plan.load(tmp_path / "plan.json")).recomputed_calls == 3


def test_an_embedding_that_scales_its_weight_is_not_pure() -> None:
    assert pure_modules.is_pure(nn.Embedding(4, 4))
    assert not pure_modules.is_pure(nn.Embedding(4, 4, max_norm=1.0))
    assert not pure_modules.is_pure(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))


def test_hooks_on_all_modules_are_noticed() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not pure_modules.is_pure(nn.Linear(4, 4))
    handle.remove()
    assert pure_modules.is_pure(nn.Linear(4, 4))


def test_batches_of_other_sizes_are_planned_without_a_metered_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dear tapes, so that both sizes are planned by module recomputation: a tape's first call needs a trial run.
    monkeypatch.setattr("tightfit.profiling.measure.measure_overhead", lambda *_: Overhead(0.1, 0.1, 0.0001, 0.0001))
    model, data = Net(feed_forward, count=4), batch()
    profile = tightfit.measure(model, data, loss=loss_of)
    budget_bytes = int(1.1 * recompute_all(profile).predicted_peak_bytes)
    other = torch.randn(17, 23, 32, generator=torch.Generator().manual_seed(2))
    plain = step(model, other)
    with tightfit.fit(model, data, budget=budget_bytes, loss=loss_of) as applied:
        assert any(recipe.executor == "module" for recipe in applied.plan.recipes)
        assert applied.plans is not None
        applied.statistics.reset()
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        loss = applied.loss(model, other)
        loss.backward()
        planned = {**snapshot(model, loss), "random state": torch.get_rng_state()}
        assert applied.plans.statistics.tried == 0
        assert applied.statistics.recomputed_calls > 0
    assert not differences(plain, planned)


def test_a_second_call_finds_the_attributes_of_the_first_and_leaves_those_of_now() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert set(modules_in(module)) == set(module.modules())
    inner = module[1]
    inner.first, inner.second = "a", "b"
    state = ModuleState(module, modules_in(module), NO_MOVES)
    with state.as_it_was():
        assert (inner.first, inner.second) == ("a", "b")
    del inner.first, inner.second
    inner.second, inner.first = "a", "b"  # the same values in the same order, under each other's names
    with state.as_it_was():
        assert (inner.first, inner.second) == ("a", "b")
        inner.third = "c"
    assert (inner.first, inner.second) == ("b", "a")
    assert not hasattr(inner, "third")
