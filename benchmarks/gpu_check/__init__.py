"""What only a GPU can show, in one command: `make gpu-check`, or `python -m benchmarks.gpu_check --help`."""
