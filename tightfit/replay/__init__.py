"""Run a plan: the tape that records what it may replay, and the session that switches tapes as regions pass.

`session` follows one forward through its regions; `tape` records a region's call and `replayer` replays parts of it;
`executors` are the ways to carry out a region's recipe; `self_check` proves at the first call that replay is right.
"""
