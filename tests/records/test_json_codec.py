"""Round trips, strictness and the frozen schemas of the records' JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.solver.profiles import random_profile
from tightfit.errors import PlanMismatch
from tightfit.records import Decision, KeptValue, Plan, PlannedRegion, Profile, Recipe, Verdict
from tightfit.records import json_codec as codec

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
RECORDS = (Profile, Plan, Verdict)

counts = st.integers(0, 2**50)
times = st.floats(0, 1e9)
texts = st.text(max_size=12)
positions = st.tuples(st.integers(0, 3), st.integers(-2, 3))

recipes = st.builds(
    Recipe,
    class_id=st.integers(0, 9),
    op_names=st.tuples(texts, texts, texts, texts),
    lever=texts,
    executor=texts,
    keep=st.lists(positions, max_size=3).map(tuple),
    drop=st.lists(positions, max_size=3).map(tuple),
    replay=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    offload=st.lists(positions, max_size=3).map(tuple),
    host_bytes=counts,
    held_bytes=counts,
    dropped_bytes=counts,
    replay_ms=times,
    kept_for_safety=st.lists(st.builds(KeptValue, op=texts, reason=texts, nbytes=counts), max_size=2).map(tuple),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    table = tuple(draw(st.lists(recipes, max_size=3)))
    keys = draw(st.lists(texts, max_size=4, unique=True))
    regions = tuple(PlannedRegion(key=key, recipe=draw(st.integers(-1, len(table) - 1))) for key in keys)
    breakdown = draw(st.dictionaries(texts, counts, max_size=4))
    return Plan(
        budget_bytes=draw(counts),
        predicted_peak_bytes=sum(breakdown.values()),
        peak_where=draw(texts),
        baseline_bytes=draw(counts),
        breakdown=breakdown,
        predicted_step_ms=draw(times),
        plain_step_ms=draw(times),
        plain_peak_bytes=draw(counts),
        overhead_ratio=draw(times),
        lower_bound_ms=draw(times),
        regions=regions,
        recipes=table,
        region_paths=tuple(draw(st.lists(texts, max_size=3))),
        model=draw(texts),
        fingerprint=draw(texts),
        batch=draw(texts),
        device=draw(texts),
        optimizer=draw(texts),
    )


def some_verdict() -> Verdict:
    return Verdict(
        ok=None, method="guarded", loss_equal=None, gradients_equal=True, buffers_equal=False, rng_equal=True,
        max_abs_difference=0.5, differing=("a", "é"), plain_reproducible=None, not_reproducible=(), unverified=("b",),
        steps=3, budget_bytes=10, plain_peak_bytes=20, plain_peak_source="measured", predicted_peak_bytes=9,
        measured_peak_bytes=8, plain_step_ms=1.5, plain_step_source="predicted", step_ms=2.0, overhead_ratio=1 / 3,
        replayed_ops=7, mismatches=0,
    )  # fmt: skip


def test_round_trip_of_a_verdict(tmp_path: Path) -> None:
    verdict = some_verdict()
    verdict.save(tmp_path / "verdict.json")
    assert Verdict.load(tmp_path / "verdict.json") == verdict


@given(plans())
def test_round_trip_of_plans(plan: Plan) -> None:
    text = json.dumps(codec.encode(plan), allow_nan=False)
    assert codec.decode(Plan, json.loads(text)) == plan


@given(st.integers(0, 10_000))
def test_round_trip_of_profiles(seed: int) -> None:
    profile = random_profile(seed)
    text = json.dumps(codec.encode(profile), allow_nan=False)
    again = codec.decode(Profile, json.loads(text))
    assert again == profile
    assert again.baseline_bytes == profile.baseline_bytes
    assert "baseline_bytes" not in json.loads(text)


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    random_profile(1).save(path)
    random_profile(2).save(str(path))
    assert Profile.load(path) == random_profile(2)
    assert [child.name for child in tmp_path.iterdir()] == ["profile.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    some_verdict().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(some_verdict(), step_ms=float("nan")).save(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        some_verdict().save(tmp_path / "folder")
    assert path.read_bytes() == before
    assert sorted(child.name for child in tmp_path.iterdir()) == ["folder", "verdict.json"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "not whole JSON"),
        (b"\x80\xff\x00", "not text"),
        (b"[1, 2]", "an array, not an object"),
        (b"{}", "its schema is None"),
        (b'{"schema": "tightfit.plan/99"}', "plan/99"),
        (b'{"schema": "tightfit.profile/1"}', "profile/1"),
        (b'{"schema": "tightfit.plan/1"}', "lacks"),
        (b'{"schema": 1, "schema": 2}', "appears twice"),
        (b'{"schema": NaN}', "NaN"),
        (b"[" * 100_000, "too deeply"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanMismatch, match=why) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).count(". ") >= 2  # found, why, what to do


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanMismatch, match="directory"):
        Plan.load(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    some_verdict().save(path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanMismatch):
            Verdict.load(path)


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_to("surprise", value=1),
        set_to("model", value=3),
        set_to("threads", value=True),
        set_to("threads", value=1.0),
        set_to("threads", value="1"),
        set_to("baseline", "parameters", value=-1),
        set_to("baseline", "surprise", value=1),
        set_to("mode_ms_per_op", value=float("inf")),
        set_to("mode_ms_per_op", value=-1),
        set_to("mode_ms_per_op", value=10**400),
        set_to("margin_bytes", value=-1),
        set_to("accumulation_steps", value=0),
        set_to("storages", 0, "nbytes", value=-8),
        set_to("storages", 0, "component", value="gpu"),
        set_to("values", 0, "storage", value=10**6),
        set_to("values", 0, "op", value=-2),
        set_to("signatures", 0, "ms", value=-1.0),
        set_to("signatures", 0, "workspace_bytes", value=-1),
        set_to("ops", 0, "signature", value=99),
        set_to("ops", 0, "inputs", value=[10**6]),
        set_to("ops", 0, "outputs", value=[-1]),
        set_to("ops", 0, "mutates", value=[10**6]),
        set_to("regions", 0, "first_op", value=1),
        set_to("regions", 0, "op_count", value=10**6),
        set_to("slots", 0, "value", value=10**6),
        set_to("slots", 0, "region", value=-1),
        set_to("events", 0, value=[0]),
        set_to("events", 0, value=[11, 0]),
        set_to("events", 0, value=[0, 10**6]),
        set_to("events", 0, value=[5, 0]),
        set_to("events", 0, value=[True, 0]),
        set_to("regions", value={}),
        set_to("events", value=None),
    ],
)
def test_tampered_profiles_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(json.dumps(codec.encode(random_profile(3))))
    change(document)
    with pytest.raises(PlanMismatch):
        codec.decode(Profile, document)


@pytest.mark.parametrize(
    "change",
    [
        set_to("regions", 0, "recipe", value=1),
        set_to("regions", 0, "recipe", value=-2),
        set_to("regions", 1, "key", value="a"),
        set_to("recipes", 0, "replay", value=[2]),
        set_to("recipes", 0, "keep", value=[[2, 0]]),
        set_to("recipes", 0, "drop", value=[[-1, 0]]),
        set_to("recipes", 0, "offload", value=[[2, 0]]),
        set_to("recipes", 0, "held_bytes", value=-1),
        set_to("recipes", 0, "host_bytes", value=-1),
        set_to("predicted_peak_bytes", value=1),
        set_to("budget_bytes", value=-1),
        set_to("exactness", value="roughly"),
    ],
)
def test_tampered_plans_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    recipe = Recipe(
        class_id=0, op_names=("x", "y"), lever="tape", executor="tape", keep=((0, 0),), drop=((1, 0),), replay=(1,),
        held_bytes=1, dropped_bytes=1, replay_ms=0.5,
    )  # fmt: skip
    plan = Plan(
        budget_bytes=9, predicted_peak_bytes=8, peak_where="a", baseline_bytes=3, breakdown={"all": 8},
        predicted_step_ms=2.0, plain_step_ms=1.0, plain_peak_bytes=12, overhead_ratio=1.0, lower_bound_ms=1.5,
        regions=(PlannedRegion(key="a", recipe=0), PlannedRegion(key="b")), recipes=(recipe,), region_paths=("a", "b"),
        model="M", fingerprint="f", batch="b", device="cpu", optimizer="",
    )  # fmt: skip
    document = json.loads(json.dumps(codec.encode(plan)))
    assert codec.decode(Plan, document) == plan
    change(document)
    with pytest.raises(PlanMismatch):
        codec.decode(Plan, document)


@given(st.integers(0, 500), st.data())
def test_no_tampering_with_one_number_crashes_what_reads_profiles(seed: int, data: st.DataObject) -> None:
    from tightfit.simulation.profile_index import ProfileIndex
    from tightfit.simulation.simulator import simulate

    document = json.loads(json.dumps(codec.encode(random_profile(seed))))
    tables = ["values", "ops", "slots", "events", "regions", "storages"]
    table = data.draw(st.sampled_from([name for name in tables if document[name]]))
    row = data.draw(st.sampled_from(document[table]))
    numbers = st.integers(-3, 12)
    if isinstance(row, list):
        row[data.draw(st.integers(0, 1))] = data.draw(numbers)
    else:
        key = data.draw(st.sampled_from(sorted(k for k, v in row.items() if type(v) in (int, list))))
        row[key] = data.draw(numbers if type(row[key]) is int else st.lists(numbers, max_size=3))
    try:
        profile = codec.decode(Profile, document)
    except PlanMismatch:
        return
    index = ProfileIndex(profile)
    simulate(index, [None] * len(profile.regions))
    simulate(index, [Decision("tape")] * len(profile.regions))


@pytest.mark.parametrize("cls", RECORDS)
def test_files_of_the_package_under_its_former_name_are_told(cls: type, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": f"recollect.{cls.__name__.lower()}/1", "budget_bytes": 1}))
    with pytest.raises(PlanMismatch, match=r"old\.json was written by recollect.* Measure and solve again"):
        cls.load(path)  # type: ignore[attr-defined]  # every record has it
    with pytest.raises(PlanMismatch, match="written by recollect"):
        codec.decode(cls, {"schema": f"recollect.{cls.__name__.lower()}/1"})


@pytest.mark.parametrize("cls", RECORDS)
def test_the_schemas_are_frozen(cls: type) -> None:
    path = SCHEMAS / f"{cls.__name__.lower()}-{codec.SCHEMA_VERSION}.schema.json"
    assert json.loads(path.read_text()) == codec.json_schema(cls), (
        "a record's shape changed: files that users have can no longer be read. If that is meant, raise "
        "codec.SCHEMA_VERSION and write what codec.json_schema gives to a new file here"
    )


def test_what_came_later_is_written_only_where_it_says_something() -> None:
    plain = random_profile(2)
    document = codec.encode(plain)
    assert "unproven" not in document  # as older code wrote it, and reads it
    assert codec.decode(Profile, document) == plain
    named = dataclasses.replace(plain, unproven=("an.operator",))
    assert codec.decode(Profile, codec.encode(named)) == named
