"""Several models, and several kinds of steps that take turns, keep one budget; bits are those of plain training."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from tests.support.several_models import (
    ROWS,
    Stack,
    batches,
    critic_loss,
    differing,
    generator_loss,
    held_bytes,
    peak_of,
    stack,
    state_of,
)  # fmt: skip
from tightfit import BudgetInfeasible, Step, UnsupportedInput
from tightfit.errors import PromiseWarning
from tightfit.installation.region_forward import RegionForward
from tightfit.report.plan_table import format_plan
from tightfit.report.text import format_peak

BATCHES = batches()
LOSSES = {"critic": critic_loss, "generator": generator_loss}
HALVES = tuple(LOSSES)


def smallest_budget(models: Any, batch: Any, **keywords: Any) -> int:
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(models, batch, budget=1000, **keywords)
    return caught.value.required_bytes


@dataclass
class Gan:
    models: dict[str, Stack]
    optimizers: dict[str, torch.optim.Optimizer]

    @property
    def steps(self) -> dict[str, Step]:
        return {kind: Step(loss=LOSSES[kind], optimizer=self.optimizers[kind]) for kind in HALVES}

    @property
    def state(self) -> dict[str, Tensor]:
        return state_of(self.models.values(), self.optimizers.values())

    def held(self, batch: Any) -> tuple[Any, ...]:
        return *self.models.values(), *self.optimizers.values(), *batch

    def half(self, kind: str, batch: Any, applied: tightfit.Applied | None) -> None:
        loss = LOSSES[kind](self.models, batch) if applied is None else applied.loss(self.models, batch, kind=kind)
        loss.backward()
        self.optimizers[kind].step()

    def train(self, applied: tightfit.Applied | None = None) -> dict[str, list[int]]:
        """Alternate; return the peaks of each half, from the second turn on."""
        peaks: dict[str, list[int]] = {kind: [] for kind in HALVES}
        for turn, batch in enumerate(BATCHES):
            for kind in HALVES:
                self.optimizers[kind].zero_grad(set_to_none=False)
                if turn == 0 or applied is None:
                    self.half(kind, batch, applied)
                else:
                    run = partial(self.half, kind, batch, applied)
                    peaks[kind].append(peak_of(run, *self.held(batch)))
        return peaks


def gan() -> Gan:
    models = {"generator": stack(), "critic": stack(8, 1, seed=1)}
    optimizers = {kind: torch.optim.Adam(models[kind].parameters(), lr=1e-2) for kind in HALVES}
    return Gan(models, optimizers)


@pytest.fixture(scope="module")
def gan_budget() -> int:
    case = gan()
    return smallest_budget(case.models, BATCHES[0], step=case.steps)


def test_the_halves_of_a_gan_are_two_kinds_of_steps_with_one_budget(gan_budget: int) -> None:
    plain, planned = gan(), gan()
    plain.train()
    before = planned.state
    with tightfit.fit(
        planned.models, BATCHES[0], step=planned.steps, budget=gan_budget, reference_budget_bytes=2**40
    ) as applied:
        assert differing(before, planned.state) == []
        peaks = planned.train(applied)
        assert applied.statistics.mismatches == applied.statistics.unplanned_calls == 0
        assert applied.statistics.replayed_ops > 0
        for kind in HALVES:
            found = applied.kinds[kind]
            assert found.verdict.ok is True
            assert found.verdict.measured_peak_bytes <= gan_budget < found.verdict.plain_peak_bytes
            assert found.profile.baseline["gradients"] == held_bytes(
                *(p.grad for m in planned.models.values() for p in m.parameters())
            )
            assert max(peaks[kind]) <= gan_budget
            assert max(peaks[kind]) == pytest.approx(found.plan.predicted_peak_bytes, rel=0.01)
        assert applied.verdict is not None
        assert applied.verdict.ok is True
        highest = max(applied.kinds[kind].verdict.measured_peak_bytes for kind in HALVES)
        assert applied.verdict.measured_peak_bytes == highest == gan_budget
    assert differing(plain.state, planned.state) == []


class Toggled(Gan):
    """Freezes the other half for the turn of one, and frees the gradients with it."""

    def half(self, kind: str, batch: Any, applied: tightfit.Applied | None) -> None:
        for name, model in self.models.items():
            model.requires_grad_(name == kind)
        super().half(kind, batch, applied)
        self.optimizers[kind].zero_grad()
        for model in self.models.values():
            model.requires_grad_(True)


def test_a_half_that_is_frozen_in_the_others_turn_is_counted_before_its_optimizer_has_state(gan_budget: int) -> None:
    case = Toggled(**vars(gan()))
    with tightfit.fit(
        case.models, BATCHES[0], step=case.steps, budget=gan_budget, reference_budget_bytes=2**40
    ) as applied:
        peaks = case.train(applied)
        assert applied.plans is not None
        assert applied.plans.statistics.tried == len(HALVES)
    assert len(peaks["critic"]) == len(peaks["generator"]) == len(BATCHES) - 1
    assert max(*peaks["critic"], *peaks["generator"]) <= gan_budget


def test_the_budget_that_is_named_does_for_all_kinds_and_one_byte_less_for_not_all(gan_budget: int) -> None:
    case = gan()
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.fit(case.models, BATCHES[0], step=case.steps, budget=gan_budget - 1)
    assert caught.value.required_bytes == gan_budget
    assert not any("forward" in vars(module) for model in case.models.values() for module in model.modules())


def test_a_half_alone_is_measured_and_verified_with_the_others_optimizer_idle(gan_budget: int) -> None:
    case = gan()
    critic, generator = (case.optimizers[kind] for kind in HALVES)
    step = Step(loss=critic_loss, optimizer=critic, idle_optimizer=generator)
    profile = tightfit.measure(case.models, BATCHES[0], step=step)
    count = [sum(p.numel() for p in m.parameters()) for m in case.models.values()]
    tensors = sum(len(list(m.parameters())) for m in case.models.values())
    assert profile.baseline["optimizer_state"] == 4 * (2 * sum(count) + tensors)
    plan = tightfit.solve(profile, budget_bytes=gan_budget)
    verdict = tightfit.verify(case.models, BATCHES[0], plan, step=step, reference_budget_bytes=2**40)
    assert verdict.ok is True
    assert verdict.measured_peak_bytes == plan.predicted_peak_bytes
    with tightfit.apply(case.models, plan, step=step) as applied:
        applied.loss(case.models, BATCHES[0]).backward()
        assert applied.statistics.replayed_ops > 0


def test_kinds_of_steps_have_names(gan_budget: int) -> None:
    case = gan()
    with tightfit.fit(case.models, BATCHES[0], step=case.steps) as applied:
        with pytest.raises(UnsupportedInput, match="no kind of step was named, and the plan has the kinds 'critic', "):
            applied.loss(case.models, BATCHES[0])
        with pytest.raises(UnsupportedInput, match="kind='judge' was asked for"):
            applied.prepare(BATCHES[0], kind="judge")
        with pytest.raises(UnsupportedInput, match="opened without its batch"), applied.step(kind="critic"):
            pass
    applied = tightfit.fit(stack(), BATCHES[0][0], loss=lambda m, x: m(x).sum())
    with pytest.raises(UnsupportedInput, match="the plan has one kind of step"), applied.step(kind="critic"):
        pass
    for steps, message in (
        ({}, "is empty"),
        ({"critic": critic_loss}, "holds a function under 'critic'"),
        ({"": Step()}, "holds a Step under ''"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            tightfit.fit(case.models, BATCHES[0], step=steps)  # type: ignore[arg-type]  # the mistake that is told
    with pytest.raises(UnsupportedInput, match="Only fit plans several kinds"):
        tightfit.measure(case.models, BATCHES[0], step=case.steps)  # type: ignore[arg-type]  # likewise


def test_one_model_may_have_several_kinds_of_steps_each_with_its_batch() -> None:
    plain, planned = stack(), stack()

    def imitate(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["y"])

    def explore(model: nn.Module, x: Tensor) -> Tensor:
        return -model(x).log_softmax(-1).amax(-1).mean()

    x, y = BATCHES[0]
    given = {"imitate": {"x": x, "y": y}, "explore": x[:100]}
    optimizer = torch.optim.SGD(planned.parameters(), lr=0.1)
    steps = {"imitate": Step(loss=imitate, optimizer=optimizer), "explore": Step(loss=explore, optimizer=optimizer)}
    with tightfit.fit(planned, given, step=steps, grad_checkpoint="full") as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        for kind, batch in given.items():
            applied.loss(planned, batch, kind=kind).backward()
            (imitate if kind == "imitate" else explore)(plain, batch).backward()
            assert differing(state_of([plain]), state_of([planned])) == []
        assert applied.statistics.mismatches == applied.statistics.unplanned_calls == 0
        with applied.step(kind="explore"):
            explore(planned, x[:100]).backward()  # recognised by its arguments
        assert applied.statistics.unplanned_calls == 0


def test_only_the_kind_whose_graph_is_kept_is_planned_again() -> None:
    case = gan()
    steps = {kind: replace(step, autocast=torch.bfloat16, clip_norm=0.1) for kind, step in case.steps.items()}
    with tightfit.fit(case.models, BATCHES[0], step=steps, grad_checkpoint="full") as applied:
        for _ in range(2):
            applied.loss(case.models, BATCHES[0], kind="critic").backward(retain_graph=True)
            applied.loss(case.models, BATCHES[0], kind="generator").backward()
        assert applied.plans is not None
        assert applied.plans.statistics.replanned == 1


def test_what_one_kind_reaches_is_counted_in_all_with_the_gradients_that_it_makes() -> None:
    model, judge = stack(), stack(8, 1, seed=1)
    steps = {
        "fool": Step(loss=lambda model, batch: F.softplus(-judge(model(batch[0]))).mean()),
        "imitate": Step(loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1])),
    }
    for order in (("fool", "imitate"), ("imitate", "fool")):
        with tightfit.fit(
            model, BATCHES[0], step={kind: steps[kind] for kind in order}, grad_checkpoint="off"
        ) as applied:
            for found in applied.kinds.values():
                parameters = sum(parameter.nbytes for parameter in judge.parameters())
                assert found.profile.baseline["reached"] == held_bytes(judge) + parameters
                assert found.verdict.measured_peak_bytes == found.plan.predicted_peak_bytes
        assert all(parameter.grad is None for parameter in judge.parameters())


# ----------------------------------------------------------------------------------------------- containers of models


def translate(models: Any, batch: Any) -> Tensor:
    encoder, decoder = models.values() if isinstance(models, dict) else models
    return F.mse_loss(decoder(encoder(batch[0]).tanh()), batch[1])


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_a_loss_is_called_with_the_container_that_was_given(kind: type) -> None:
    def train(planned: bool) -> dict[str, Tensor]:
        pair = [stack(), stack(seed=1)]
        models: Any = dict(zip(["encoder", "decoder"], pair, strict=True)) if kind is dict else kind(pair)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in pair]
        seen = []

        def loss(given: Any, batch: Any) -> Tensor:
            seen.append((type(given), given is models))
            return translate(given, batch)

        applied = None
        if planned:
            applied = tightfit.fit(
                models, BATCHES[0], loss=loss, optimizer=optimizers, grad_checkpoint="full", budget=2**22
            )
            assert {one for one, _ in seen} == {kind}
            assert any(is_given for _, is_given in seen)  # else a copy without data
            assert {path for path in applied.plan.region_paths if "." not in path} == {
                "<model>", *(models if kind is dict else "01")
            }  # fmt: skip
        for rows in (ROWS, 100, ROWS):  # a new size is planned in between
            batch = tuple(tensor[:rows] for tensor in BATCHES[1])
            (loss(models, batch) if applied is None else applied.loss(models, batch)).backward()
            for optimizer in optimizers:
                optimizer.step()
        state = state_of(pair, optimizers)
        if applied is not None:
            assert applied.statistics.mismatches == 0
            assert applied.statistics.replayed_ops > 0
            again = copy.deepcopy(models), pickle.loads(pickle.dumps(models))
            for one in again:
                first = one["encoder"] if kind is dict else one[0]
                assert not any(isinstance(vars(m).get("forward"), RegionForward) for m in first.modules())
            applied.remove()
            assert not any("forward" in vars(module) for model in pair for module in model.modules())
        return state

    assert differing(train(planned=False), train(planned=True)) == []


class TiedHead(nn.Module):
    """A model that shares a part with another."""

    def __init__(self, encoder: Stack) -> None:
        super().__init__()
        self.encoder, self.out = encoder, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x))  # type: ignore[no-any-return]  # calls of modules are not annotated


def test_models_that_share_a_part_one_of_them_frozen_one_in_eval_mode() -> None:
    def train(planned: bool) -> tuple[dict[str, Tensor], int]:
        encoder = stack()
        torch.manual_seed(2)
        models = [encoder, TiedHead(encoder), stack(seed=4).requires_grad_(False), stack(seed=5).eval()]

        def loss(given: Any, batch: Any) -> Tensor:
            one, tied, frozen, still = given
            return (
                (one(batch[0]) + tied(batch[1])).pow(2).mean() + frozen(one(batch[1])).mean() + still(batch[0]).mean()
            )

        held = 0
        if planned:
            applied = tightfit.fit(models, BATCHES[0], loss=loss, grad_checkpoint="full")
            assert applied.verdict is not None
            assert applied.verdict.ok
            held = applied.plan.breakdown["parameters"]
            applied.loss(models, BATCHES[0]).backward()
            assert applied.statistics.mismatches == 0
            applied.remove()
        else:
            loss(models, BATCHES[0]).backward()
        parameters = {id(p): p.nbytes for model in models for p in model.parameters()}
        assert held in (0, sum(parameters.values()))
        return state_of(models), held

    (plain, _), (planned, held) = train(planned=False), train(planned=True)
    assert held
    assert differing(plain, planned) == []


@pytest.mark.usefixtures("one_process_group")
def test_models_that_distributed_data_parallel_wraps_after_fit() -> None:
    plain, planned = gan(), gan()
    with tightfit.fit(planned.models, BATCHES[0], loss=generator_loss, grad_checkpoint="full") as applied:
        wrapping = {name: nn.parallel.DistributedDataParallel(model) for name, model in planned.models.items()}
        applied.loss(wrapping, BATCHES[0]).backward()
        assert applied.statistics.mismatches == 0
        assert applied.statistics.replayed_ops > 0
    generator_loss(plain.models, BATCHES[0]).backward()
    assert differing(plain.state, planned.state) == []


def test_a_model_called_outside_of_any_step_keeps_the_bits_and_is_told() -> None:
    plain, planned = gan(), gan()
    with tightfit.fit(planned.models, BATCHES[0], loss=generator_loss, grad_checkpoint="full") as applied:
        with pytest.warns(PromiseWarning, match="runs outside the model's planned forward"):
            generator_loss(planned.models, BATCHES[0]).backward()
        assert applied.installed
    generator_loss(plain.models, BATCHES[0]).backward()
    assert differing(plain.state, planned.state) == []


def of_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "an empty list was given as the models. There is nothing to train"),
        ({}, "an empty dict"),
        ({"a": stack(), "b": 3.0}, "holds a float under 'b', which is not a torch.nn.Module"),
        ([stack()] * 2, "holds the same Stack under 0 and 1"),
        ([stack(), of_meta(stack())], "on several devices .0: cpu, 1: meta."),
        ([stack(), nn.DataParallel(stack())], "nn.DataParallel"),
        ([stack().requires_grad_(False)], "0: Stack has no parameter that requires a gradient"),
        ({stack()}, "the model is a set"),
    ],
    ids=["empty list", "empty dict", "no module", "twice", "two devices", "data parallel", "frozen", "a set"],
)
def test_what_is_no_set_of_models(models: Any, message: str) -> None:
    for entry in (tightfit.measure, tightfit.fit):
        with pytest.raises(UnsupportedInput, match=message):
            entry(models, BATCHES[0], loss=translate)


def test_several_models_need_a_loss() -> None:
    with pytest.raises(UnsupportedInput, match="several models were given without a loss function"):
        tightfit.fit([stack(), stack()], BATCHES[0])


# -------------------------------------------------------------------------------------------- what else is in memory


@pytest.mark.parametrize("frozen", [True, False])
def test_a_moving_average_among_the_models_is_counted_without_gradients(frozen: bool) -> None:
    def train(planned: bool) -> tuple[dict[str, Tensor], int, int]:
        model = stack()
        average = copy.deepcopy(model).requires_grad_(not frozen)
        models = {"model": model, "average": average}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss(given: Any, batch: Any) -> Tensor:
            return F.mse_loss(given["model"](batch[0]), batch[1])

        applied, measured = None, 0
        if planned:
            applied = tightfit.fit(models, BATCHES[0], loss=loss, optimizer=optimizer, grad_checkpoint="full")
            assert applied.verdict is not None
            assert applied.verdict.ok
            measured = applied.verdict.measured_peak_bytes
            assert applied.plan.breakdown["parameters"] == 2 * applied.plan.breakdown["gradients"]
        peak = 0
        for batch in BATCHES[:3]:
            optimizer.zero_grad(set_to_none=False)

            def run(batch: Any = batch) -> None:
                (loss(models, batch) if applied is None else applied.loss(models, batch)).backward()
                optimizer.step()
                with torch.no_grad():
                    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                        mean.lerp_(value, 0.1)

            if applied is not None and batch is not BATCHES[0]:
                peak = max(peak, peak_of(run, model, average, optimizer, *batch))
            else:
                run()
        if applied is not None:
            applied.remove()
        return state_of([model, average], [optimizer]), peak, measured

    plain, _, _ = train(planned=False)
    planned, peak, measured = train(planned=True)
    assert differing(plain, planned) == []
    assert peak == measured


def test_a_teacher_and_a_queue_that_only_the_loss_reaches_are_counted_and_named() -> None:
    student, teacher = stack(), stack(seed=7).eval()
    queue = torch.randn(256, 8)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch[0])
        made = model(batch[0])
        return F.mse_loss(made, wanted) + (made @ queue.t()).logsumexp(-1).mean()

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    budget = smallest_budget(student, BATCHES[0], loss=loss, optimizer=optimizer)
    with tightfit.fit(
        student, BATCHES[0], loss=loss, optimizer=optimizer, budget=budget, reference_budget_bytes=2**40
    ) as applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.profile is not None
        assert applied.profile.baseline["reached"] == held_bytes(teacher, queue)
        assert "what only the loss reaches" in format_peak(applied.plan, None)
        assert "what only the loss reaches" in format_plan(applied.plan)

        def run() -> None:
            applied.loss(student, BATCHES[0]).backward()
            optimizer.step()

        run()
        optimizer.zero_grad(set_to_none=False)
        peak = peak_of(run, student, teacher, queue, optimizer, *BATCHES[0])
        assert peak == applied.verdict.measured_peak_bytes <= budget
        assert peak == pytest.approx(applied.plan.predicted_peak_bytes, rel=0.01)


def test_gradients_that_a_backward_gives_to_what_the_loss_reaches_are_counted_and_proven() -> None:
    def train(planned: bool) -> dict[str, Tensor]:
        generator, critic = stack(), stack(8, 1, seed=1)
        optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return F.softplus(-critic(model(batch[1]))).mean()

        def run(applied: tightfit.Applied | None) -> None:
            (loss(generator, BATCHES[0]) if applied is None else applied.loss(generator, BATCHES[0])).backward()
            optimizer.step()

        if not planned:
            run(None)
            run(None)
            return state_of([generator, critic])
        with tightfit.fit(generator, BATCHES[0], loss=loss, optimizer=optimizer, grad_checkpoint="full") as applied:
            assert all(parameter.grad is None for parameter in critic.parameters())
            assert applied.verdict is not None
            assert applied.verdict.ok
            run(applied)
            assert applied.profile is not None
            assert applied.profile.baseline["reached"] == held_bytes(critic)  # with its gradients
            measured = applied.verdict.measured_peak_bytes
            assert peak_of(lambda: run(applied), generator, critic, *BATCHES[0]) == measured
        return state_of([generator, critic])

    assert differing(train(planned=False), train(planned=True)) == []


def test_a_rollout_without_gradients_and_its_update_keep_the_budget() -> None:
    def train(planned: bool) -> dict[str, Tensor]:
        models = {"policy": stack(8, 4), "value": stack(8, 1, seed=1)}
        optimizers = [torch.optim.Adam(model.parameters()) for model in models.values()]
        seen = BATCHES[0][0]

        def rollout() -> dict[str, Tensor]:
            with torch.no_grad():
                logits = models["policy"](seen)
                actions = logits.argmax(-1)
                old = logits.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
                return {"seen": seen, "actions": actions, "old": old, "returns": models["value"](seen).squeeze(-1) + 1}

        def loss(given: Any, buffer: Any) -> Tensor:
            logits = given["policy"](buffer["seen"]).log_softmax(-1)
            value = given["value"](buffer["seen"]).squeeze(-1)
            ratio = (logits.gather(-1, buffer["actions"][:, None]).squeeze(-1) - buffer["old"]).exp()
            gain = buffer["returns"] - value.detach()
            clipped = ratio.clamp(0.8, 1.2)
            return F.mse_loss(value, buffer["returns"]) - torch.minimum(ratio * gain, clipped * gain).mean()

        applied, measured = None, 0
        if planned:
            buffer = rollout()
            applied = tightfit.fit(models, buffer, loss=loss, optimizer=optimizers, grad_checkpoint="full")
            assert applied.verdict is not None
            assert applied.verdict.ok
            measured = applied.verdict.measured_peak_bytes
            del buffer
            for model, fresh in zip(models.values(), (stack(8, 4), stack(8, 1, seed=1)), strict=True):
                model.load_state_dict(fresh.state_dict())  # the rollout moved the statistics

        def turn() -> None:
            buffer = rollout()
            for _ in range(2):
                (loss(models, buffer) if applied is None else applied.loss(models, buffer)).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)

        turn()
        if applied is None:
            turn()
        else:
            assert peak_of(turn, *models.values(), *optimizers, seen) == measured
            assert applied.statistics.unplanned_calls == applied.statistics.mismatches == 0
            applied.remove()
        return state_of(models.values(), optimizers)

    assert differing(train(planned=False), train(planned=True)) == []
