"""What differs between devices: memory, capacity, meters, out-of-memory errors; and budgets on them."""
