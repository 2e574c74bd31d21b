"""Observing a step for a GPU that is not here: what its operations are, what they hold, and what they would take."""
