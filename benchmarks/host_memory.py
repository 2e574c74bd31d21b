"""Count what planning takes of the host's memory for each parameter of a model that is on a GPU.

    EMULATED_CUDA_SPARSE_COPIES=1 python -m tests.emulated_cuda.run python -m benchmarks.host_memory 0.3 0.7 1.5
    EMULATED_CUDA_SPARSE_COPIES=1 python -m tests.emulated_cuda.run python -m benchmarks.host_memory 8 --ranks 8

Llama in fp32 with AdamW is fitted at half of what can be saved.  What is counted are the requests to PyTorch's
allocator of host memory; with that switch emulated devices need none of it.  With `--ranks` this process is one of a
sharded model's (FSDP2), the others of which do not exist: what they would say is taken to be what this one says.
"""

from __future__ import annotations

import argparse
import resource
from dataclasses import replace

import torch
from torch import nn

import tightfit
from benchmarks.llama import Llama, LlamaSizes
from tests.emulated_cuda.counters import is_active
from tightfit.device.host_meter import measure_host_peak
from tightfit.distributed.process_group import ProcessGroup
from tightfit.solver.solver import Solver

GIB = 2**30
#: Of a model with 1.5 B parameters, but for the number of layers.
_SIZES = LlamaSizes(hidden=2048, heads=16, kv_heads=8, intermediate=8192)


def model_of(billions: float) -> Llama:
    """Make a model of about so many parameters on the GPU."""
    with torch.device("meta"):
        one, two = (_count(Llama(replace(_SIZES, layers=layers))) for layers in (1, 2))
    layers = max(1, round((billions * 1e9 - one) / (two - one)) + 1)
    with torch.device("cuda"):
        return Llama(replace(_SIZES, layers=layers)).train()


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shard_alone(model: Llama, ranks: int) -> None:
    """Shard the model over this process and others that do not exist."""
    from torch.distributed import init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    ProcessGroup.all_gather = lambda self, thing: [thing] * ranks  # type: ignore[method-assign]  # all ranks hold the same
    ProcessGroup.broadcast = lambda self, thing: thing  # type: ignore[method-assign]  # all ranks hold the same
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def report(billions: float, ranks: int) -> None:
    """Fit one model, and print what that took."""
    torch.manual_seed(0)
    model = model_of(billions)
    count = _count(model)
    if ranks > 1:
        shard_alone(model, ranks)
    tokens = torch.randint(0, _SIZES.vocabulary, (1, 2049), device="cuda")
    step = tightfit.Step(loss=lambda model, tokens: model(tokens), optimizer=torch.optim.AdamW(model.parameters()))
    profile = tightfit.measure(model, tokens, step=step)
    solver = Solver(profile)
    budget = (solver.smallest().peak_bytes + solver.plain(0).predicted_peak_bytes) // 2
    applied, peak_bytes = measure_host_peak(
        lambda: tightfit.fit(
            model, tokens, budget=budget, step=step, profile=profile, reference_budget_bytes=80 * GIB
        ),
        0,
    )  # fmt: skip
    verdict = applied.verdict
    assert verdict is not None
    applied.remove()
    own = count / ranks
    print(
        f"{count / 1e9:.2f} B parameters{f', a {ranks}th of them here' if ranks > 1 else ''}: "
        f"{peak_bytes / GIB:.2f} GiB of host memory, {peak_bytes / own:.3f} bytes for each parameter; "
        f"{verdict.method}, {verdict.replayed_ops} operations replayed; "
        f"resident at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
        flush=True,
    )


def main() -> None:
    """Fit the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("billions", type=float, nargs="+", help="of parameters")
    parser.add_argument("--ranks", type=int, default=1, help="processes that the model is sharded over")
    arguments = parser.parse_args()
    if not is_active():
        parser.error("the figures are of emulated devices: python -m tests.emulated_cuda.run python -m ...")
    for billions in arguments.billions:
        report(billions, arguments.ranks)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
