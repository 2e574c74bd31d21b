"""Every way to train in less memory, side by side: `make bench`, or `python -m benchmarks.side_by_side --help`."""
