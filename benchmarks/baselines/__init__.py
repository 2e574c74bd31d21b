"""Planners from the literature and simple policies, to be held against tightfit's plans under the same costs."""
