"""Several processes: the process group, FSDP2 and `DTensor`."""
