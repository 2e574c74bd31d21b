"""What an operation or a module reads, writes and draws at random, and so what may be recomputed."""
