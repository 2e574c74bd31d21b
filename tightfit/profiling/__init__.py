"""`measure`: what one training step does to memory and time, without needing the memory that is missing."""
