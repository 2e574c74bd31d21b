"""Started by torchrun: hosts that train in two processes, plain and inside a budget; rank 0 prints what was found.

torchrun --nproc-per-node 2 -m tests.integrations.two_processes trainer_ddp 2200000
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin

import tightfit
from tests.integrations.llama_trainer import BUDGET, Tokens, model, trained
from tightfit.integrations.transformers import TightfitCallback

FSDP2 = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}


def trainer_ddp(budget: int | None, found: list[Any]) -> list[torch.Tensor]:
    """Batches of other lengths on each rank, which plan them at other times."""
    return _trainer(budget, found, Tokens((16, 24, 32)))


def trainer_fsdp(budget: int | None, found: list[Any]) -> list[torch.Tensor]:
    _shard_on_cpus()
    return _trainer(budget, found, Tokens(), fsdp=True, fsdp_config=FSDP2, eval_strategy="no")


def accelerate_fsdp(budget: int | None, found: list[Any]) -> list[torch.Tensor]:
    """A loop of one's own, whose model has a cache of keys and values; `fit` in a backward that does not reduce."""
    _shard_on_cpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    net = model()
    data = torch.utils.data.DataLoader([row["input_ids"] for row in map(Tokens().__getitem__, range(16))], batch_size=4)
    net, optimizer, loader = accelerator.prepare(net, torch.optim.AdamW(net.parameters()), data)
    loss, applied = _loss_of, None
    for tokens in [*loader, *loader]:
        with accelerator.accumulate(net):
            if budget is not None and applied is None:
                applied = tightfit.fit(
                    net, tokens, budget=budget, loss=_loss_of, optimizer=optimizer.optimizer, accumulation_steps=2,
                    clip_norm=1.0,
                )  # fmt: skip
                loss = applied.loss
            accelerator.backward(loss(net, tokens))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if applied is not None:
        found.append(copy.copy(applied.statistics))
        applied.remove()
    return [parameter.detach() for parameter in net.parameters()]


def _trainer(budget: int | None, found: list[Any], data: Any, **options: Any) -> list[torch.Tensor]:
    callback = None if budget is None else TightfitCallback(budget=budget)

    def watch(trainer: Any) -> None:
        step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            if callback is not None and callback.applied is not None:
                found.append(copy.copy(callback.applied.statistics))
            return loss

        trainer.training_step = watched

    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(callback, data, watch, output_dir=folder, **options)
    return [parameter.detach() for parameter in trainer.model.parameters()]


def _shard_on_cpus() -> None:
    """accelerate leaves a plugin for FSDP out where there is no accelerator, without a word."""
    AcceleratorState._reset_state()
    begin = AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = with_plugin


def _loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def lightning_ddp(budget: int | None, found: list[Any]) -> list[torch.Tensor]:
    """The gradients of each rank's batches are averaged."""
    from lightning.pytorch import LightningModule, Trainer

    from tightfit.integrations.lightning import TightfitCallback as LightningCallback

    class Module(LightningModule):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            super().__init__()
            self.llama = model()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return _loss_of(self.llama, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    torch.manual_seed(0)
    module = Module()
    callback = LightningCallback(budget=10**9 if budget is None else 3_000_000)
    end = callback.on_train_end

    def ended(*args: Any) -> None:
        assert callback.applied is not None
        found.append(copy.copy(callback.applied.statistics))
        end(*args)

    callback.on_train_end = ended
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[] if budget is None else [callback],
    )  # fmt: skip
    data = [row["input_ids"] for row in map(Tokens().__getitem__, range(16))]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return [parameter.detach() for parameter in module.parameters()]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reports = {}
    for name in sys.argv[1:]:
        run = globals()[name]
        statistics: list[Any] = []
        plain, planned = run(None, statistics), run(BUDGET, statistics)
        last = statistics[-1]
        reports[name] = {
            "same": all(torch.equal(local(a), local(b)) for a, b in zip(plain, planned, strict=True)),
            "recomputes": last.replayed_ops + last.recomputed_calls > 0,
            "sharded": any(hasattr(parameter, "to_local") for parameter in planned),
        }
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, reports)
    if dist.get_rank() == 0:
        print(json.dumps(everyones), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # the models refer to the process group, whose threads would have to end before Python does


def local(tensor: Any) -> torch.Tensor:
    """What this process holds of a sharded tensor."""
    found: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


if __name__ == "__main__":
    main()
