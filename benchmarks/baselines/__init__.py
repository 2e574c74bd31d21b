"""Planners from the literature and simple policies, to be held against recollect's plans under the same costs."""
