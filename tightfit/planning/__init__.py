"""`fit`: the four verbs with repair, and the cache of plans by the step's shape."""
