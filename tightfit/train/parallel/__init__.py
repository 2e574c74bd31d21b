"""How a model is trained by several processes: DistributedDataParallel and FSDP2."""
