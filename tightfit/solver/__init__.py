"""Choose what every region keeps and what it recomputes: the fastest plan under the peak at every moment.

`columns` evaluates a decision for a region, `pricing` finds the one that prices want, `master` combines columns under
the memory of every moment, `column_generation` fills the pool, `lower_bound` says how fast any plan could be,
`plan_builder` writes the plan.

The plan space: for each region call, untouched or any decision of a lever (`tightfit.simulation.levers`).  Within it,
the answer is exact where the classes' decisions are enumerated and the search ends before its count of nodes; elsewhere
it is the best choice found among generated columns.  In both cases `Plan.lower_bound_ms` is a valid bound, so the
distance is known.  The smallest budget is the least peak that the same columns reach.  Nothing here needs torch.
"""
