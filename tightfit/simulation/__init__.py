"""Predict peak memory and step time: a profile's timeline, edited by decisions. Needs no PyTorch."""
