"""PyTorch's stacks: modes and hooks are there when a region needs them, and never afterwards."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.replay.helpers import differences, planned, retained_bytes, snapshot
from tightfit._torch_private.autograd import top_saved_tensor_hooks
from tightfit._torch_private.dispatch import dispatch_depth
from tightfit.errors import UnsupportedInput
from tightfit.replay.installed import Installed

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _stacks_stay_clean() -> Iterator[None]:
    assert dispatch_depth() == 0
    yield
    assert dispatch_depth() == 0
    assert top_saved_tensor_hooks() is None


class Block(nn.Module):
    """Four operations; notes what is on PyTorch's stacks while it runs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((dispatch_depth(), top_saved_tensor_hooks() is not None))
        return self.linear(x).sin().exp().tanh()


class Tower(nn.Module):
    """Blocks with operations of its own in between."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            self.seen.append(dispatch_depth())
            x = block(x).cos() * x
        self.seen.append(dispatch_depth())
        return x


def step(model: nn.Module, *, backward: bool = True, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    model.zero_grad()
    loss = model(torch.randn(4, 8)).sum()
    if backward:
        loss.backward()
    return snapshot(model, loss)


def check(model: nn.Module, *paths: str, **options: Any) -> Installed:
    """The planned step equals the plain one, twice (the first is the self-check)."""
    plain = step(model)
    with planned(model, *paths, **options) as installed:
        assert differences(plain, step(model)) == []
        assert differences(plain, step(model)) == []
    return installed


def test_an_untouched_region_carries_no_mode() -> None:
    model = Tower()
    recipes = {"<model>#0": None, "blocks.0#0": None, "blocks.2#0": None}
    recipes |= {f"<model>#0/{n}": None for n in range(1, 4)}
    with planned(model, "", "blocks.0", "blocks.1", "blocks.2", recipes=recipes):
        step(model)
    assert [block.seen for block in model.blocks] == [[(0, False)], [(1, True)], [(0, False)]]
    assert model.seen == [0, 0, 0, 0]


def test_segments_of_a_container_carry_the_mode_where_they_drop() -> None:
    model = Tower()
    recipes = {f"blocks.{n}#0": None for n in range(3)}
    with planned(model, "", "blocks.0", "blocks.1", "blocks.2", recipes=recipes):
        step(model)
    assert [block.seen for block in model.blocks] == [[(0, False)]] * 3
    assert model.seen == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "paths", [("",), ("blocks.1",), ("blocks.0", "blocks.1", "blocks.2"), ("", "blocks.0", "blocks.1", "blocks.2")]
)
def test_nested_and_separate_regions(paths: tuple[str, ...]) -> None:
    model = Tower()
    installed = check(model, *paths)
    assert installed.statistics.replayed_ops > 0


@pytest.mark.parametrize("setting", ["no_grad", "inference_mode", "set_grad_enabled"])
def test_without_grad_there_is_no_mode(setting: str) -> None:
    model = Tower()
    context = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    }[setting]  # fmt: skip
    with planned(model, "", "blocks.0", "blocks.1", "blocks.2") as installed, context():
        model(torch.randn(4, 8))
    assert {entry for block in model.blocks for entry in block.seen} == {(0, False)}
    assert installed.statistics.unplanned_calls == 0


def test_a_no_grad_part_inside_a_region() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            with torch.no_grad():
                scale = self.inner(y).exp()
            return y * scale

    check(Model(), "", "inner")


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["inside", "between", "in a hook"])
def test_an_exception_in_forward_leaves_the_model_usable(where: str) -> None:
    model = Tower()
    armed = True

    def fail(*_: Any) -> None:
        if armed:
            raise Boom

    if where == "inside":
        model.blocks[1].linear.register_forward_hook(fail)
    elif where == "between":
        model.blocks[1].register_forward_hook(fail)
    else:
        model.blocks[2].register_forward_pre_hook(fail)
    with planned(model, "", "blocks.0", "blocks.1", "blocks.2") as installed:
        for _ in range(2):
            with pytest.raises(Boom):
                step(model)
            assert dispatch_depth() == 0
            assert top_saved_tensor_hooks() is None
            assert not installed.sessions
        armed = False
        replayed = step(model)
    assert differences(step(model), replayed) == []


def test_an_exception_caught_inside_forward() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.risky = Block()
            self.safe = Block()

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.risky(x[:, :3])  # the wrong shape: raises in the middle of the region
            except RuntimeError:
                x = x.sin()
            return self.safe(x).exp()

    check(Careful(), "", "risky", "safe")


def test_two_threads_at_once_are_refused() -> None:
    model = Tower(1)
    inside, leave = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert leave.wait(10)
            return x.sin()

    model.add_module("slow", Slow())
    model.blocks[0].register_forward_pre_hook(lambda _m, args: (model.slow(args[0]),))
    errors: list[BaseException] = []

    def other() -> None:
        try:
            step(model)
        except BaseException as error:
            errors.append(error)

    with planned(model, "", "blocks.0"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        with pytest.raises(UnsupportedInput, match="two threads"):
            model(torch.randn(4, 8))
        leave.set()
        thread.join()
        assert errors == []  # the first one is not disturbed
        step(model)  # and one after the other is fine


class Foreign(nn.Module):
    """Pushes somebody's mode or hooks around a call of a region, inside a region."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inner, self.after = Block(), Block(), Block()
        self.kind = kind

    def around(self) -> Any:
        if self.kind == "flops":
            return FlopCounterMode(display=False)
        if self.kind == "save_on_cpu":
            return save_on_cpu()
        if self.kind == "hooks":
            return saved_tensors_hooks(lambda t: (t.clone(),), lambda packed: packed[0])
        return PassThrough()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).sin()
        with self.around():
            x = self.inner(x.cos()).exp()
            with self.around():
                x = self.inner(x) + 1
        return self.after(x).cos()


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["flops", "save_on_cpu", "hooks", "mode"])
@pytest.mark.parametrize(
    "recipes",
    [{}, {"inner#0": None}, {"<model>#0": None, "<model>#0/1": None}, {"<model>#0/2": None, "inner#1": None}],
    ids=["all", "inner untouched", "outer untouched", "mixed"],
)
def test_modes_and_hooks_of_the_model_s_own(kind: str, recipes: dict[str, None]) -> None:
    installed = check(Foreign(kind), "", "before", "inner", "after", recipes=recipes)
    assert installed.statistics.replayed_ops > 0


@pytest.mark.parametrize("kind", ["flops", "save_on_cpu", "hooks", "mode"])
def test_modes_and_hooks_around_the_model(kind: str) -> None:
    model = Tower()
    outside = Foreign(kind)
    plain = step(model)
    with planned(model, "", "blocks.0", "blocks.1"), outside.around():
        assert differences(plain, step(model)) == []


def test_flops_are_counted_once_as_plain_counts_them() -> None:
    model = Tower()
    counts = []
    for paths in ((), ("blocks.0", "blocks.1", "blocks.2")):
        with planned(model, *paths), FlopCounterMode(display=False) as counter:
            step(model, backward=False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class Checkpointed(Tower):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False).cos() * x
        return x


class PartlyCheckpointed(Tower):
    """The checkpoint also holds operations that are in no region below it, of the same shapes."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block(x.sin()).cos() * x, x, use_reentrant=False) + x
        return x


@pytest.mark.parametrize("kind", [Checkpointed, PartlyCheckpointed])
@pytest.mark.parametrize("paths", [("",), ("blocks.0", "blocks.2"), ("", "blocks.1")])
def test_checkpoint_of_pytorch_inside_and_around_regions(kind: type[Tower], paths: tuple[str, ...]) -> None:
    check(kind(), *paths)


def test_checkpoint_of_pytorch_around_the_model() -> None:
    model = Tower()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x.sin(), use_reentrant=False).cos()

    check(Outer(), "model", "model.blocks.0")


def test_a_region_inside_a_function_transform() -> None:
    class PerSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            slopes = torch.func.grad(lambda y: self.block(y).sum())(x.detach())
            return self.block(x) * slopes

    check(PerSample(), "block")


def test_a_backward_inside_forward() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            energy = self.block(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return force.sin() * x

    check(Energy(), "", "block")


def test_a_module_called_again_and_again() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.block(x)
            return self.block(x.detach()) * x

    installed = check(Repeated(), "", "block")
    assert {f"block#{n}" for n in range(4)} <= installed.checked


def test_a_region_that_calls_itself() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, depth: int = 3) -> Tensor:
            x = self.linear(x).sin()
            return self(x, depth - 1).exp().tanh() if depth else x

    check(Recursive(), "")


def live_tensors() -> tuple[int, int]:
    kinds = (torch.Tensor, nn.Parameter)  # other tests of this process may have left fake or sparse ones
    tensors = [o for o in gc.get_objects() if type(o) in kinds and o.layout is torch.strided]
    return len(tensors), sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("keep", ["nothing", "everything"])
@pytest.mark.parametrize("end", ["backward", "no backward", "exception"])
def test_nothing_leaks_without_the_garbage_collector(end: str, keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tower()
    if keep == "everything":  # as if nothing could be proved replayable
        monkeypatch.setattr("tightfit.replay.current_values.can_rebuild", lambda _: False)

    def one() -> None:
        if end == "backward":
            step(model)
            model.zero_grad()
        elif end == "no backward":
            step(model, backward=False)
        else:
            with pytest.raises(RuntimeError):
                model(torch.randn(4, 3))

    with planned(model, "", "blocks.0", "blocks.2"):
        one()
        gc.collect()
        gc.disable()
        try:
            one()
            before = live_tensors()
            _, held_bytes = retained_bytes(lambda: [one() for _ in range(50)])
            assert held_bytes == 0
            assert live_tensors() == before
        finally:
            gc.enable()
