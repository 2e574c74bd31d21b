"""Time planning: what measuring, solving and the rest of `fit` take, and how many times the step is run.

    python -m benchmarks.planning_times [ROW ...] [--rounds N] [--output FILE.md]

Each row has processes of its own, one for each round, with nothing cached; the median counts.  The budget is half way
between the smallest and the plain peak.  Seconds of one thread's processor come first, those of the clock on the wall
after them, as the computer may be busy.  ``new shape`` is what a batch of another size costs before its step
begins.  Rows of torchvision and timm need these libraries (benchmarks/zoo/requirements.txt).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tightfit
from benchmarks.llama import Llama, LlamaSizes
from benchmarks.zoo.limited import Limits, run_limited
from tests.suite.vision import UNet
from tests.support.chains import ResidualMLP
from tightfit.step.model import give_gradients

LIMITS = Limits(seconds=300, memory_bytes=12 << 30)

Loss = Callable[[nn.Module, Any], Tensor]
Made = tuple[nn.Module, Callable[[int], Any], Loss]
"""A model, a batch of some size, and the loss."""


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch)
    return result.pow(2).mean()


def llama() -> Made:
    sizes = LlamaSizes(hidden=64, heads=4, kv_heads=2, intermediate=176, layers=24, vocabulary=256)
    return Llama(sizes), lambda n: torch.randint(0, 256, (4, 16 * n + 1)), lambda model, batch: model(batch)


def vit() -> Made:
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
    return encoder, lambda n: torch.randn(4, 16 * n, 64), mean_square


def unet() -> Made:
    return UNet(16, 4), lambda n: torch.randn(2, 3, 16 * n, 16 * n), mean_square


class Repeated(nn.Module):
    """One module called 48 times, as an integrator of differential equations does."""

    def __init__(self, times: int = 48, width: int = 32) -> None:
        super().__init__()
        self.times = times
        self.slope = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times // 4):
            first = self.slope(x)
            second = self.slope(x + first / 20)
            third = self.slope(x + second / 20)
            x = x + (first + 2 * second + 2 * third + self.slope(x + third / 10)) / 60
        return x


class ConvLstm(nn.Module):
    """Twenty steps of a recurrent convolution, as a loop in Python."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.gates = nn.Conv2d(2 * channels, 4 * channels, 3, 1, 1)
        self.enter, self.leave = nn.Conv2d(1, channels, 1), nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = cell = x.new_zeros(x.shape[0], self.channels, *x.shape[-2:])
        for moment in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([self.enter(moment), state], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        result: Tensor = self.leave(state)
        return result


class Recurrent(nn.Module):
    """A GRUCell in a loop of 300 steps."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[1:])
        for moment in x:
            state = self.cell(moment, state)
        result: Tensor = self.head(state)
        return result


class RandomBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.2)


class OneRegion(nn.Module):
    """112 operations in one region, with random numbers from everywhere between them."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RandomBlock(width) for _ in range(4))
        self.generator = [torch.Generator().manual_seed(3)]

    def forward(self, x: Tensor) -> Tensor:
        generator = self.generator[0]
        for layer in self.layers:
            x = layer(x)
            x = x * (1 + 0.1 * torch.randn(x.shape, generator=generator))
            x = x + torch.tanh(x) * torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
            x = F.dropout(x, 0.1)
            x = x * F.dropout(torch.ones_like(x), 0.1)
        return x


class ManyParameters(nn.Module):
    """5,000 linear layers with a bias: 10,000 parameter tensors."""

    def __init__(self, blocks: int = 50, each: int = 100, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(width, width) for _ in range(each))) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def _detector(name: str) -> Made:
    from torchvision.models import detection

    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5, min_size=128, max_size=128)

    def batch(n: int) -> Any:
        side = 32 * n
        target = {
            "boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0], [30.0, 40.0, 100.0, 90.0]]),
            "labels": torch.tensor([1, 2]),
        }
        target["masks"] = torch.ones(2, side, side, dtype=torch.uint8)
        return [torch.rand(3, side, side) for _ in range(2)], [dict(target) for _ in range(2)]

    return model, batch, lambda model, batch: torch.stack(list(model(*batch).values())).sum()


def hrnet() -> Made:
    import timm

    return (
        timm.create_model("hrnet_w18_small", num_classes=10),
        lambda n: torch.randn(2, 3, 32 * (n // 2), 32 * (n // 2)),  # it halves the sides five times
        mean_square,
    )


ROWS: dict[str, Callable[[], Made]] = {
    "Llama, 24 layers": llama,
    "ViT, 24 layers": vit,
    "UNet": unet,
    "one module, 48 calls": lambda: (Repeated(), lambda n: torch.randn(16 * n, 32), mean_square),
    "ConvLSTM, 20 steps": lambda: (ConvLstm(), lambda n: torch.randn(n, 20, 1, 24, 24), mean_square),
    "1,000 layers": lambda: (
        ResidualMLP(1000, 16),
        lambda n: torch.randn(16 * n, 16),
        lambda model, batch: model(batch),
    ),
    "Faster R-CNN": lambda: _detector("fasterrcnn_mobilenet_v3_large_320_fpn"),
    "Mask R-CNN": lambda: _detector("maskrcnn_resnet50_fpn"),
    "HRNet": hrnet,
    "10,000 parameters": lambda: (ManyParameters(), lambda n: torch.randn(16 * n, 8), mean_square),
    "GRUCell, 300 steps": lambda: (Recurrent(), lambda n: torch.randn(300, 16 * n, 16), mean_square),
    "112 operations, one region": lambda: (OneRegion(), lambda n: torch.randn(2 * n, 16, 64), mean_square),
}


@dataclass
class Times:
    """Of one round: seconds of the processor and on the wall, by part."""

    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: int = 0
    """Of the step that `fit` ran, forward and backward, with the measuring before it."""
    operations: int = 0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[part] = time.process_time() - begin_cpu, time.perf_counter() - begin


def time_row(name: str, tell: Callable[[Times], None]) -> None:
    """Plan a row's model as somebody does who trains it for the first time."""
    torch.manual_seed(0)
    model, make_batch, loss = ROWS[name]()
    give_gradients(model)
    # Who trains has made an optimizer before: with the first one, PyTorch imports some eight hundred modules.
    torch.optim.SGD(model.parameters(), lr=0.1)
    found = Times()
    real = type(next(model.parameters()))

    def counted(model: nn.Module, batch: Any) -> Tensor:
        found.steps += type(next(model.parameters())) is real
        return loss(model, batch)

    batch = make_batch(4)
    with found.of("measure"):
        profile = tightfit.measure(model, batch, loss=counted)
    found.operations = len(profile.ops)
    with found.of("smallest"):
        try:
            tightfit.solve(profile, 1)
        except tightfit.BudgetInfeasible as error:
            budget = (error.required_bytes + tightfit.solve(profile, 1 << 50).predicted_peak_bytes) // 2
    with found.of("solve"):
        tightfit.solve(profile, budget)
    tell(found)
    with found.of("fit"):
        applied = tightfit.fit(model, batch, budget=budget, loss=counted, profile=profile)
    tell(found)
    smaller = make_batch(3)
    with found.of("new shape"):
        applied.prepare(smaller)
    tell(found)


_PARTS = ("measure", "smallest", "solve", "fit", "new shape")
#: What somebody waits for: `fit` finds what was solved before.
_TOGETHER = ("measure", "smallest", "solve", "fit")


def line(name: str, rounds: list[Times], failure: str) -> str:
    """One row of the table."""
    cells = []
    for part in _PARTS:
        times = [one.seconds[part] for one in rounds if part in one.seconds]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        cells.append(f"{medians[0]:.1f} ({medians[1]:.1f})" if medians else failure or "")
    together = [sum(one.seconds[part][0] for part in _TOGETHER) for one in rounds if "fit" in one.seconds]
    steps = max((one.steps for one in rounds), default=0)
    operations = max((one.operations for one in rounds), default=0)
    whole = f"{statistics.median(together):.1f}" if together else failure
    return f"| {name} | {operations} | " + " | ".join(cells) + f" | {whole} | {steps} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning_times", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    lines = [
        f"PyTorch {torch.__version__}, one thread, median of {given.rounds}; seconds of the processor (on the wall)",
        "",
        f"| model | operations | {' | '.join(_PARTS)} | together | steps run |",
        "|" + "---|" * (len(_PARTS) + 4),
    ]
    print("\n".join(lines), flush=True)
    for name in given.rows or ROWS:
        rounds, failure = [], ""
        for _ in range(given.rounds):
            ended = run_limited(time_row, name, limits=LIMITS)
            rounds += ended.told[-1:]
            failure = failure or ended.failure
        lines.append(line(name, rounds, failure))
        print(lines[-1], flush=True)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
