"""Started by torchrun: training under DistributedDataParallel with a static graph, plain and planned; rank 0 prints
what was found as one JSON document.

    torchrun --nproc-per-node 2 -m tests.train.parallel.wrapped_steps
"""

from __future__ import annotations

import json
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tightfit


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).pow(2).mean()  # type: ignore[no-any-return]  # calls of modules are not annotated


def train(order: str) -> list[Tensor]:
    """Every gradient of some steps, and at the end all weights; `order`: when the model gets its plan, if ever."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(3)))
    generator = torch.Generator().manual_seed(9 + dist.get_rank())
    batches = [(torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, found = loss_of, []
    for event in (order if order == "before" else "", "wrap", order if order != "before" else ""):
        if event == "wrap":
            wrapped = DistributedDataParallel(model, static_graph=True)
        elif event:
            given = wrapped if event == "wrapped" else model
            loss = tightfit.fit(given, batches[0], loss=loss_of, optimizer=optimizer, grad_checkpoint="full").loss  # type: ignore[assignment]  # its arguments have other names
    for batch in batches:
        optimizer.zero_grad()
        loss(wrapped, batch).backward()
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
    return found + [parameter.detach() for parameter in model.parameters()]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plain = train("")
    equal = {order: all(map(torch.equal, plain, train(order))) for order in ("before", "after", "wrapped")}
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, equal)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
