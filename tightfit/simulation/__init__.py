"""The one oracle of peak memory and step time: a profile's timeline, edited by a plan. Needs no PyTorch."""
