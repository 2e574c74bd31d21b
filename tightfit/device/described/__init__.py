"""GPUs that are not here: what is known of each card, and how PyTorch's operations are on CUDA, for fake tensors."""
