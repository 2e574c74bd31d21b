"""What `torch.compile` made, called by an eager model, runs compiled under a plan, and is recomputed as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import tightfit
from tightfit.operators.compiled_calls import RunsWithoutData
from tightfit.profiling.fake_tensor_leaks import NamespaceSnapshot
from tightfit.profiling.observed_run import Needs, observe_fake
from tightfit.profiling.signatures import SignatureTable
from tightfit.records import Profile
from tightfit.solver.solver import full_plan
from tightfit.step.step import Step

# Dynamo's own, when it looks at an argument.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

WIDTH = 16
BATCH = torch.randn(8, WIDTH)

ran: list[type] = []
"""By run of compiled code, the type of its first argument."""


def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A compiler whose code runs the graph's operations one after another."""

    def run(*args: Any) -> Any:
        ran.append(type(args[0]))
        return graph.forward(*args)

    return run


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    ran.clear()
    yield
    torch.compiler.reset()


def gate(x: Tensor, y: Tensor) -> Tensor:
    return (x * 1.5 + y).sin() * y.exp() / (1 + x * x)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    )


class Gated(nn.Module):
    """Attention as it is called with flex_attention: a compiled function between eager projections."""

    def __init__(self, fused: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fused(self.a(x).sin().cos(), x).tanh())


class Layer(nn.Module):
    def __init__(self, fused: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gated, self.mlp = Gated(fused), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.gated(x))


class Net(nn.Module):
    def __init__(self, fused: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(fused) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).sin().exp()).tanh()


def graphs_in(profile: Profile) -> list[str]:
    """Why each compiled graph of a step is kept; empty where it may be made again."""
    names = [profile.signatures[op.signature].name for op in profile.ops]
    return [op.keep_reason for name, op in zip(names, profile.ops, strict=True) if name.endswith("CompiledFunction")]


@pytest.mark.parametrize("warm", [True, False], ids=["has run", "new"])
@pytest.mark.parametrize("how", ["aot_eager", backend], ids=["a graph", "operations"])
def test_a_compiled_function_runs_compiled_under_a_plan(how: Any, warm: bool) -> None:
    model = Net(torch.compile(gate, backend=how))
    if warm:
        model(BATCH).backward()
        model.zero_grad()
    profile = tightfit.measure(model, BATCH)
    assert profile.method == "real"
    assert graphs_in(profile) == ([""] * 3 if how == "aot_eager" else [])
    plan = full_plan(profile, 2**40)
    verdict = tightfit.verify(model, BATCH, plan, reference_budget_bytes=2**40)
    assert (verdict.ok, verdict.mismatches, verdict.compared_share) == (True, 0, 1.0)
    assert verdict.replayed_ops > 0
    assert set(ran) <= {Tensor}
    with tightfit.apply(model, plan) as applied:
        before = len(ran)
        applied.loss(model, BATCH).backward()
        assert applied.statistics.mismatches == 0
        assert len(ran) - before == (3 if how is backend else 0)


@pytest.mark.parametrize("warm", [True, False], ids=["has run", "new"])
def test_compiled_blocks_are_made_again_as_a_whole(warm: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(3)])
    for block in model:
        block.compile(backend="aot_eager")
    if warm:
        model(BATCH).sum().backward()
    profile = tightfit.measure(model, BATCH, loss=lambda m, b: m(b).pow(2).mean())
    assert graphs_in(profile) == [""] * 3
    applied = tightfit.fit(
        model, BATCH, loss=lambda m, b: m(b).pow(2).mean(), grad_checkpoint="full", reference_budget_bytes=2**40
    )
    with applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.replayed_ops >= 3
        assert applied.verdict.mismatches == 0


def test_a_compiled_function_may_call_modules() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = mlp(), mlp()
            self.through = torch.compile(lambda x: self.inner(x).sin(), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return (self.outer(x) + self.through(x)).pow(2).mean()

    model = Whole()
    profile = tightfit.measure(model, BATCH)
    verdict = tightfit.verify(model, BATCH, full_plan(profile, 2**40), reference_budget_bytes=2**40)
    assert verdict.ok
    assert verdict.replayed_ops > 0


def test_a_compiled_loss_is_planned_with_the_model() -> None:
    square = torch.compile(lambda x: x.sin().square().mean(), backend=backend)
    applied = tightfit.fit(
        mlp(), BATCH, loss=lambda model, batch: square(model(batch)), grad_checkpoint="full",
        reference_budget_bytes=2**40,
    )  # fmt: skip
    with applied:
        assert applied.verdict is not None
        assert applied.verdict.ok
        assert applied.verdict.replayed_ops > 0
    assert set(ran) == {Tensor}


def test_compiled_code_never_gets_tensors_without_data() -> None:
    model = Net(torch.compile(gate, backend=backend))
    model(BATCH)
    ran.clear()
    found = observe_fake(model, BATCH, Step(), SignatureTable(), {}, NamespaceSnapshot())
    assert (found, ran) == (Needs.OTHERS, [])
    assert issubclass(RunsWithoutData, RuntimeError)
    model(BATCH)
    assert ran == [Tensor] * 3


class Tracing(nn.Module):
    """Traces in its forward, as `torch.cond` and its kin do at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        graph = make_fx(lambda y: y.sin() * y.exp())(torch.ones(64, 64, requires_grad=True))
        return self.layers(x + graph(x)).pow(2).mean()


def test_what_is_traced_is_not_the_steps() -> None:
    model = Tracing()
    profile = tightfit.measure(model, BATCH)
    assert sum(storage.nbytes == 64 * 64 * 4 for storage in profile.storages) == 1  # what it is traced with
    with tightfit.apply(model, full_plan(profile, 2**40)) as applied:
        model(BATCH).backward()
        planned = [parameter.grad for parameter in model.parameters()]
        assert applied.statistics.replayed_ops
        assert not applied.statistics.mismatches
    model.zero_grad()
    model(BATCH).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(planned, model.parameters(), strict=True))


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.mean() > 0, lambda z: z.sin() * 2, lambda z: z.cos(), (self.layers(x),))
        return y.pow(2).mean()


@pytest.mark.slow
def test_higher_order_operators_are_kept_and_named() -> None:
    profile = tightfit.measure(Choosing(), BATCH)
    reasons = {profile.signatures[op.signature].name: op.keep_reason for op in profile.ops}
    assert reasons["cond"] == "a higher-order operator"
