"""Measure one training step: `measure` returns its memory and time, within the memory that a planned step needs."""
