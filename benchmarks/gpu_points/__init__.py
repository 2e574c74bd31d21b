"""Predictions for GPUs that are not here, held against what other people measured on them."""
