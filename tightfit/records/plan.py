"""What to do in each region of a step: decisions, recipes, and the plan with what it is predicted to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tightfit.peak_breakdown import format_parts, parts_of_peak
from tightfit.records import json_codec
from tightfit.records.checks import require
from tightfit.records.decision import Decision
from tightfit.records.notebook import html_table
from tightfit.records.recompute_tree import RecomputeTree
from tightfit.units import format_bytes

#: Python objects in host memory that a planned step holds: for each operation that may be replayed, and for each
#: time that autograd saves a value that is dropped. Upper estimates, measured with tracemalloc; not part of the budget.
TAPED_OP_HOST_BYTES = 1600
DROPPED_SLOT_HOST_BYTES = 1400


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptValue:
    """A value that is kept for safety, whatever the budget, and why."""

    op: str
    reason: str
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to do in a region: shared by all regions of one class with the same decision."""

    class_id: int
    op_names: tuple[str, ...]
    """The operations that the decision was made for: the live tape follows it only as long as they agree."""
    lever: str
    """Name of the lever whose model of memory and time decided for it."""
    executor: str
    """Name of the executor that carries it out."""
    keep: tuple[tuple[int, int], ...]
    """(position, output) of each value that is held although it could be dropped, sorted."""
    drop: tuple[tuple[int, int], ...]
    """(position, output) of each saved value that is dropped and recomputed, sorted. Any other saved value is held."""
    replay: tuple[int, ...]
    """Positions of the operations that recomputation runs, sorted."""
    held_bytes: int
    """Bytes this region holds from the end of its forward to its backward, parameters and batch apart."""
    dropped_bytes: int
    """Bytes that autograd saves in the plain step and that this recipe does not hold."""
    replay_ms: float
    """Time of the recomputed operations."""
    offload: tuple[tuple[int, int], ...] = ()
    """(position, output) of each value that is moved to host memory, sorted."""
    host_bytes: int = 0
    """Host memory that the executor's own Python objects take until backward: beside the budget, not within it."""
    kept_for_safety: tuple[KeptValue, ...] = ()

    @property
    def decision(self) -> Decision:
        """The decision that it was made from."""
        return Decision(self.lever, frozenset(self.keep), frozenset(self.offload))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRegion:
    """The decision for one region."""

    key: str
    recipe: int = -1
    """Index into `Plan.recipes`; -1 leaves the region untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTape:
    """Consecutive regions that share one tape: what passes between them is dropped and recomputed, too."""

    first: int
    """Index of the first region, in `Profile.regions` and `Plan.regions`."""
    count: int
    tree: RecomputeTree
    """What replay holds at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A decision for every region of a step, with what the step is predicted to cost under it.

        plan = tightfit.solve(profile, budget_bytes=8 * 2**30)
        plan.save("plan.json")
        plan = tightfit.Plan.load("plan.json")

    Peaks are totals in the budget's terms: all device memory that the process holds at a moment.

    Attributes:
        budget_bytes: the budget that it was solved for.
        predicted_peak_bytes: peak of the planned step.
        peak_where: when the peak is reached: a region's key, ``backward of KEY`` or ``optimizer step``.
        baseline_bytes: resident memory: parameters, buffers, gradients, optimizer state, batch.
        breakdown: bytes at the moment of the peak, by component; they add up to `predicted_peak_bytes`.
        predicted_step_ms: time of the planned step.
        plain_step_ms: time of the plain step, as predicted.
        plain_peak_bytes: peak of the plain step, as predicted.
        overhead_ratio: `predicted_step_ms` / `plain_step_ms` - 1.
        lower_bound_ms: no plan of the plan space is faster than this at this budget.
        regions: which recipe each region follows.
        recipes: what to keep and recompute in a region; regions of one class with the same decision share one.
        model: the model's class name.
        fingerprint: digest of the names, shapes and dtypes of parameters and buffers: says of which model the plan is.
        batch: the batch's shapes and dtypes, for people.
        device: the device that it was measured on.
    """

    budget_bytes: int
    predicted_peak_bytes: int
    peak_where: str
    baseline_bytes: int
    breakdown: Mapping[str, int]
    predicted_step_ms: float
    plain_step_ms: float
    plain_peak_bytes: int
    overhead_ratio: float
    lower_bound_ms: float
    regions: tuple[PlannedRegion, ...]
    recipes: tuple[Recipe, ...]
    region_paths: tuple[str, ...]
    """Module paths that are regions."""
    shared_tapes: tuple[SharedTape, ...] = ()
    """Regions that share tapes, in order; empty unless the budget needs recursive recomputation."""
    model: str
    fingerprint: str
    batch: str
    device: str
    optimizer: str
    """Empty when the optimizer was not measured: its state and step are then not in the figures."""
    excluded: tuple[str, ...] = ()
    """Paths of the modules that are left untouched, as ``exclude=`` named them."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """As `Profile.checkpoints`."""
    predicted_allocated_bytes: int = 0
    """The most that the step has allocated at a moment; the peak where the allocator reserves nothing beyond it."""
    predicted_reserved_bytes: int = 0
    """The most that the allocator reserves for it, once steps find what earlier ones left in the cache; the peak where
    it reserves nothing beyond what is allocated."""
    flushes_per_step: int = 0
    """How often a step meets the process's cap, and the allocator gives its whole cache back to go on: each waits for
    the device."""
    exactness: str = "bitwise"
    """"bitwise": gradients are bit for bit those of the plain step. No plan promises less."""

    def check(self) -> None:
        """Raise ValueError where an index or a size cannot be right."""
        for name, size in (("budget_bytes", self.budget_bytes), ("baseline_bytes", self.baseline_bytes)):
            require(size >= 0, f"{name} is negative")
        require(self.exactness == "bitwise", f"exactness is {self.exactness!r}")
        require(
            sum(self.breakdown.values()) == self.predicted_peak_bytes,
            "breakdown does not add up to predicted_peak_bytes",
        )
        keys = [region.key for region in self.regions]
        require(len(set(keys)) == len(keys), "regions name one region twice")
        for region in self.regions:
            require(-1 <= region.recipe < len(self.recipes), f"{region.key} names recipe {region.recipe}")
        _check_shared_tapes(self)
        for place, recipe in enumerate(self.recipes):
            count = len(recipe.op_names)
            require(all(0 <= op < count for op in recipe.replay), f"recipes[{place}].replay names no operation")
            pairs = (*recipe.keep, *recipe.drop, *recipe.offload)
            require(all(0 <= op < count for op, _ in pairs), f"recipes[{place}] keeps or drops what no operation makes")
            sizes = (recipe.held_bytes, recipe.dropped_bytes, recipe.host_bytes)
            require(min(sizes) >= 0, f"recipes[{place}] has negative bytes")

    @property
    def tape_host_bytes(self) -> int:
        """Host memory that the executors' own Python objects take, at most: beside the budget, not within it."""
        return sum(self.recipes[region.recipe].host_bytes for region in self.regions if region.recipe >= 0)

    @property
    def decisions(self) -> list[Decision | None]:
        """The decision for each region; None where it is untouched."""
        return [self.recipes[region.recipe].decision if region.recipe >= 0 else None for region in self.regions]

    @property
    def is_plain(self) -> bool:
        """True when nothing is dropped, nor kept that the model itself would: applying the plan installs nothing."""
        return all(region.recipe < 0 for region in self.regions) and not self.takes_over_checkpoints

    @property
    def takes_over_checkpoints(self) -> bool:
        """Whether functions to which the model itself applies `torch.utils.checkpoint` are the plan's to decide."""
        return not all(self.checkpoints.values())

    def _repr_html_(self) -> str:
        planned = [self.recipes[region.recipe] for region in self.regions if region.recipe >= 0]
        dropped_bytes = sum(recipe.dropped_bytes for recipe in planned)
        rows = [
            ("budget", format_bytes(self.budget_bytes)),
            ("peak", f"{format_bytes(self.predicted_peak_bytes)} predicted, at {self.peak_where}"),
            ("plain peak", f"{format_bytes(self.plain_peak_bytes)} predicted"),
            ("recomputed", f"{format_bytes(dropped_bytes)} in {len(planned)} of {len(self.regions)} regions"),
            ("time", f"{self.predicted_step_ms:.1f} ms, plain {self.plain_step_ms:.1f} ms: {self.overhead_ratio:+.1%}"),
            ("at the peak", format_parts(parts_of_peak(self.breakdown, self.peak_where))),
            ("batch", self.batch),
        ]
        return html_table(f"Plan for {self.model} on {self.device}", rows)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, as JSON."""
        json_codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file. Raises `PlanMismatch` if the file is not one."""
        return json_codec.load(cls, path)


def _check_shared_tapes(plan: Plan) -> None:
    end = 0
    for place, shared in enumerate(plan.shared_tapes):
        require(shared.first >= end and shared.count >= 1, f"shared_tapes[{place}] does not follow the one before")
        end = shared.first + shared.count
        require(end <= len(plan.regions), f"shared_tapes[{place}] names no region")
        recipes = [region.recipe for region in plan.regions[shared.first : end]]
        require(all(recipe >= 0 for recipe in recipes), f"shared_tapes[{place}] has an untouched region")
        tree = shared.tree
        require(len(tree.depths) == len(tree.cuts), f"shared_tapes[{place}].tree has cuts without depth")
        require(list(tree.cuts) == sorted(set(tree.cuts)), f"shared_tapes[{place}].tree has cuts out of order")
        require(
            all(0 <= region < shared.count and position >= 0 for region, position in tree.cuts)
            and all(depth >= 0 for depth in tree.depths),
            f"shared_tapes[{place}].tree names no place in its regions",
        )
