"""recollect trains any PyTorch model inside the memory you have."""
