"""Do budgets on CUDA hold in every step, and how much of them is left unused?

    python -m tests.emulated_cuda.run python -m benchmarks.reserved_bytes          # emulated devices do
    python -m benchmarks.reserved_bytes --only mixer,encoder --budgets 2

Each model is fitted to budgets between its smallest and its plain peak, and trained for 40 steps: half of them free
their gradients, half of them keep them.  The highest total of all steps (reserved bytes, and what the process holds
outside PyTorch) must be within the budget.  What is left of the budget is the slack.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tightfit
from tightfit.device import device_for
from tightfit.errors import BudgetInfeasible
from tightfit.solver.solver import Solver

STEPS = 40
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    """Of a batch: sequences and tokens, or images and pixels."""
    autocast: torch.dtype | None = None
    lengths: tuple[float, ...] = (1.0,)
    """Parts of the batch's second size that steps have in turn; the largest one is planned for."""
    evaluates: bool = False
    """The model is evaluated between steps, as often as every tenth."""


@dataclass(frozen=True)
class Row:
    """One training."""

    name: str
    budget_bytes: int
    plain_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    total_bytes: int
    measured_bytes: int
    highest_bytes: int
    slack: float
    added_time: float
    is_plain: bool
    fit_s: float


class Encoder(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, vocabulary: int = 32000) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), tokens.flatten())


class Mixer(nn.Module):
    def __init__(self, layers: int, width: int, tokens: int) -> None:
        super().__init__()
        self.inside = nn.Embedding(1000, width)
        self.across = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
            for _ in range(layers)
        )
        self.along = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inside(tokens)
        for across, along in zip(self.across, self.along, strict=True):
            x = x + across(x.transpose(1, 2)).transpose(1, 2)
            x = x + along(x)
        return x.pow(2).mean()


class Convolutions(nn.Module):
    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 7, stride=2, padding=3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.head = nn.Linear(width, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        side = int(pixels.shape[1] ** 0.5)
        x = self.stem(pixels[:, : side * side].float().view(-1, 1, side, side))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3))).logsumexp(1).mean()


#: A trial keeps a copy of parameters and optimizer state in host memory: these models have at most 0.2 B parameters.
CASES = (
    Case("mixer", lambda: Mixer(6, 512, 256), (32, 256)),
    Case("encoder", lambda: Encoder(8, 768, 12), (8, 512)),
    Case("encoder bf16", lambda: Encoder(12, 768, 12), (16, 1024), autocast=torch.bfloat16),
    Case("varying lengths", lambda: Encoder(8, 768, 12), (8, 768), lengths=(1.0, 0.6, 0.83, 0.4, 1.0)),
    Case("evaluated", lambda: Encoder(12, 512, 8), (32, 512), evaluates=True),
    Case("convolutions", lambda: Convolutions(12, 96), (64, 192 * 192)),
    Case("large encoder", lambda: Encoder(24, 768, 12), (16, 1024)),
)


def train(case: Case, model: nn.Module, applied: tightfit.Applied, optimizer: torch.optim.Optimizer) -> int:
    """Take the steps and return the most bytes that the process held within them."""
    where = device_for("cuda")
    outside_bytes = where.held_bytes() - where.reserved_bytes()
    highest = 0
    for step in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        batch = batch_of(case, case.lengths[step % len(case.lengths)])
        with torch.autocast("cuda", case.autocast, enabled=case.autocast is not None), applied.step(batch):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step < STEPS // 2)
        if case.evaluates and step % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(batch)
            model.train()
        highest = max(highest, torch.cuda.max_memory_reserved() + outside_bytes)
    return highest


def batch_of(case: Case, share: float = 1.0) -> Tensor:
    return torch.zeros(case.size[0], int(case.size[1] * share), dtype=torch.long, device="cuda")


def rows_of(case: Case, count: int) -> list[Row]:
    model = case.make().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    profile = tightfit.measure(model, batch_of(case), optimizer=optimizer, autocast=case.autocast)
    solver = Solver(profile)
    smallest, plain = solver.minimum_budget()[0], solver.plain(0).predicted_peak_bytes
    found = []
    for place in range(count):
        budget = int(smallest + place / count * (plain - smallest))
        begin = time.perf_counter()
        applied = fitted(case, model, optimizer, budget, profile)
        fit_s = time.perf_counter() - begin
        highest = train(case, model, applied, optimizer)
        plan, verdict = applied.plan, applied.verdict
        assert verdict is not None
        found.append(
            Row(
                name=case.name,
                budget_bytes=plan.budget_bytes,
                plain_bytes=plain,
                allocated_bytes=plan.predicted_allocated_bytes,
                reserved_bytes=plan.predicted_reserved_bytes,
                total_bytes=plan.predicted_peak_bytes,
                measured_bytes=verdict.measured_peak_bytes,
                highest_bytes=highest,
                slack=1 - highest / plan.budget_bytes,
                added_time=plan.overhead_ratio,
                is_plain=plan.is_plain,
                fit_s=fit_s,
            )
        )
        applied.remove()
        optimizer.state.clear()
        optimizer.zero_grad()
        print(line(found[-1]), flush=True)
    return found


def fitted(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, budget: int, profile: Any
) -> tightfit.Applied:
    """Fit to the budget; where a trial run shows that it is too small, to the one that is named."""
    for _ in range(3):
        try:
            return tightfit.fit(
                model, batch_of(case), budget=budget, optimizer=optimizer, autocast=case.autocast, profile=profile,
                on_failure="warn",
            )  # fmt: skip
        except BudgetInfeasible as refused:
            budget = refused.required_bytes
    raise RuntimeError(f"{case.name}: the budget that is named, {budget}, is refused")


def line(row: Row) -> str:
    gib = [
        f"{nbytes / GIB:8.3f}"
        for nbytes in (
            row.budget_bytes, row.allocated_bytes, row.reserved_bytes, row.total_bytes, row.measured_bytes,
            row.highest_bytes,
        )
    ]  # fmt: skip
    kept = "kept" if row.highest_bytes <= row.budget_bytes else "EXCEEDED"
    return f"{row.name:16} {' '.join(gib)} {row.slack:7.1%} {row.added_time:7.1%} {row.fit_s:6.1f} s  {kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of models, separated by commas")
    parser.add_argument("--budgets", type=int, default=4, help="how many for each model")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else [case.name for case in CASES]
    warnings.simplefilter("ignore")
    print("GiB:               budget allocated reserved    total measured  highest   slack    time    fit")
    rows: list[Row] = []
    for case in CASES:
        if case.name in wanted:
            rows += rows_of(case, arguments.budgets)
            gc.collect()
            torch.cuda.empty_cache()
    binding = [row.slack for row in rows if not row.is_plain]
    exceeded = sum(row.highest_bytes > row.budget_bytes for row in rows)
    print(
        f"{len(rows)} trainings of {STEPS} steps: {exceeded} over the budget; slack where the plan binds: "
        f"median {statistics.median(binding):.1%}, worst {max(binding):.1%}"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
