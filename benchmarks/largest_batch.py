"""Is the batch that `grow` finds the largest that trains?  It is tried, one sample after another.

    python -m benchmarks.largest_batch
    python -m tests.emulated_cuda.run python -m benchmarks.largest_batch --device cuda

Each model is given what its plain step takes for a number of samples.  Then steps are run: on a GPU in a process whose
allocator may reserve no more than the budget, so that what is too large runs out of memory; on a CPU under the meter.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tightfit
from tightfit.device import device_for
from tightfit.errors import BudgetInfeasible
from tightfit.solver.solver import solver_of

#: Further samples that are tried where one more fits, too.
_FURTHER = 4
_STEPS = 3


class Encoder(nn.Module):
    """A transformer on tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, width)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True) for _ in range(3))
        )
        self.head = nn.Linear(width, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.embed(tokens)))
        return found


class Residual(nn.Module):
    """A convolutional block with a way around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(image + self.second(self.first(image)))


class Mixer(nn.Module):
    """A block that mixes tokens, then channels."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, value: Tensor) -> Tensor:
        value = value + self.tokens(self.norms[0](value).transpose(1, 2)).transpose(1, 2)
        found: Tensor = value + self.channels(self.norms[1](value))
        return found


class Unet(nn.Module):
    """Down, and up again beside what was there on the way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU())
        self.inner = nn.Sequential(*(Residual(2 * width) for _ in range(2)))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.after = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 3, 1))

    def forward(self, image: Tensor) -> Tensor:
        first = self.before(image)
        found: Tensor = self.after(torch.cat([first, self.up(self.inner(self.down(first)))], dim=1))
        return found


class Recurrent(nn.Module):
    """A cell that is called for each element of a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, width)
        self.head = nn.Linear(width, 8)

    def forward(self, sequence: Tensor) -> Tensor:
        state = sequence.new_zeros(len(sequence), self.cell.hidden_size)
        for element in sequence.unbind(1):
            state = self.cell(element, state)
        found: Tensor = self.head(state)
        return found


@dataclass(frozen=True)
class Case:
    """A model, and what a sample of its batch is like."""

    name: str
    make: Callable[[int], nn.Module]
    """Called with how many times larger than on a CPU it is to be."""
    shape: tuple[int, ...]
    samples: int
    """The budget is what its plain step takes for so many."""
    adam: bool = False
    whole: bool = False

    def batch(self, count: int, device: torch.device) -> Tensor:
        """Return a batch of so many samples."""
        shape = (count, *self.shape)
        if self.whole:
            return torch.zeros(shape, dtype=torch.long, device=device)
        return torch.ones(shape, device=device)


def _perceptron(scale: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 256 * scale), nn.Tanh(), nn.Linear(256 * scale, 64)) for _ in range(4))
    )


def _residual(scale: int) -> nn.Module:
    width = 8 * scale
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *(Residual(width) for _ in range(3)))


CASES = (
    Case("perceptron", _perceptron, (64,), 200),
    Case("residual", _residual, (3, 16, 16), 24),
    Case("encoder", lambda scale: Encoder(32 * scale), (32,), 12, adam=True, whole=True),
    Case("mixer", lambda scale: nn.Sequential(*(Mixer(32 * scale, 16) for _ in range(3))), (16, 32), 20, adam=True),
    Case("unet", lambda scale: Unet(8 * scale), (3, 16, 16), 16, adam=True),
    Case("recurrent", lambda scale: Recurrent(32 * scale), (12, 8), 40),
)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return a number that all of the output has a part in."""
    return model(batch).square().mean()


class Trials:
    """Steps of a model in batches of any size, within a budget."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.scale = 1 if device.type == "cpu" else 4
        self.case, self.device = case, device
        self.budget_bytes = self._plain_bytes(case.samples)

    def model(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a new model and its optimizer."""
        model = self.case.make(self.scale)
        if self.case.name == "mixer" and self.scale > 1:
            model = nn.Sequential(nn.Linear(32, 32 * self.scale), *model)
        model.to(self.device)
        kind = torch.optim.AdamW if self.case.adam else torch.optim.SGD
        return model, kind(model.parameters(), lr=1e-3)

    def batch(self, count: int) -> Tensor:
        """Return a batch of so many samples."""
        return self.case.batch(count, self.device)

    def grown(self) -> tightfit.Growth:
        """Ask for the largest batch."""
        model, optimizer = self.model()
        return tightfit.grow(
            model, self.batch, budget=self.budget_bytes, loss=loss, optimizer=optimizer, most=64 * self.case.samples
        )

    def runs_planned(self, count: int) -> bool:
        """Tell whether training with a plan keeps the budget."""
        with self._alone(), suppress(BudgetInfeasible):
            model, optimizer = self.model()
            options = {"loss": loss, "optimizer": optimizer}
            applied = tightfit.fit(model, self.batch(count), budget=self.budget_bytes, **options)
            try:
                return self._steps(lambda batch: applied.loss(model, batch), optimizer, count)
            finally:
                applied.remove()
        return False

    def runs_plain(self, count: int) -> bool:
        """Tell whether the plain training keeps it."""
        with self._alone():
            model, optimizer = self.model()
            return self._steps(lambda batch: loss(model, batch), optimizer, count)

    def _steps(self, compute: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, count: int) -> bool:
        batch = self.batch(count)
        resident = [batch, *(p for group in optimizer.param_groups for p in group["params"])]

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            compute(batch).backward()
            optimizer.step()

        try:
            with self._capped():
                step()  # makes gradients and states
                resident += [p.grad for p in resident[1:] if p.grad is not None]
                resident += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
                for _ in range(_STEPS - 1):
                    held_bytes = sum(device_for(self.device).round_up(t.nbytes) for t in resident)
                    _, peak_bytes = device_for(self.device).measure_peak(step, held_bytes, from_empty=False)
                    if peak_bytes > self.budget_bytes:
                        return False
        except torch.OutOfMemoryError:
            return False
        return True

    @contextmanager
    def _capped(self) -> Iterator[None]:
        """Let the allocator reserve what a context leaves of the budget, where an allocator can be told."""
        if self.device.type == "cpu":
            yield
            return
        device = device_for(self.device)
        outside_bytes = device.held_bytes() - device.reserved_bytes()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((self.budget_bytes - outside_bytes) / device.capacity_bytes())
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._clean()
        try:
            yield
        finally:
            self._clean()

    def _clean(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def _plain_bytes(self, count: int) -> int:
        model, optimizer = self.model()
        profile = tightfit.measure(model, self.batch(count), loss=loss, optimizer=optimizer)
        return solver_of(profile).plain(0).predicted_peak_bytes


def largest(runs: Callable[[int], bool], found: int) -> int:
    """Return the largest number that runs, of those near the one that was found."""
    truth = next((number for number in range(found, 0, -1) if runs(number)), 0)
    if truth == found:
        truth = max([found, *(number for number in range(found + 1, found + _FURTHER + 1) if runs(number))])
    return truth


def main() -> None:
    """Print what was found for each model, and what was true."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest_batch", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"PyTorch {torch.__version__}, {options.device}")
    print(f"{'model':<12}{'budget MiB':>12}{'plain':>8}{'tried':>8}{'planned':>9}{'tried':>8}{'CPU s':>8}")
    worst = 0
    for case in CASES:
        if options.only and case.name not in options.only.split(","):
            continue
        torch.manual_seed(0)
        trials = Trials(case, torch.device(options.device))
        begin = time.process_time()
        found = trials.grown()
        seconds = time.process_time() - begin
        plain = largest(trials.runs_plain, found.plain_largest)
        planned = largest(trials.runs_planned, found.largest)
        worst = max(worst, abs(planned - found.largest), abs(plain - found.plain_largest))
        print(
            f"{case.name:<12}{trials.budget_bytes / 2**20:>12.1f}{found.plain_largest:>8}{plain:>8}{found.largest:>9}"
            f"{planned:>8}{seconds:>8.1f}",
            flush=True,
        )
    print(f"at most {worst} off; with a larger number than those tried beyond, {_FURTHER} each, nothing was run")


if __name__ == "__main__":
    main()
