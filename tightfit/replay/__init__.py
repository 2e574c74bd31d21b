"""Running a plan: the tape that records what it may replay, and the session that switches tapes as regions pass.

`ops` knows what an operation does; `safety` decides what may be replayed; `tape` holds one region call; `session`
follows one forward through its regions; `cursor` names the regions.
"""
