"""Synthetic profiles: training steps written down by hand or drawn at random, without any tensor.

A step is a row of *templates*, one for each region; two regions with the same template are of the same class.  An
operation names what it reads by `Own(i)` (the region's i-th value so far), `STREAM` (what the region before handed on),
`SHARED` (a value of the first region, read by many) or `WEIGHT`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tightfit.records import Event, EventKind, Op, Profile, Region, Signature, Slot, Storage, Value


class Own(NamedTuple):
    """The region's i-th value."""

    place: int


STREAM, SHARED, WEIGHT = "stream", "shared", "weight"
Source = Own | str


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One operation of a template."""

    ms: float = 1.0
    reads: tuple[Source, ...] = ()
    makes: tuple[int, ...] = ()
    """Bytes of each new result."""
    mutates: tuple[Source, ...] = ()
    """Those of `reads` that it writes into."""
    saves: tuple[Source, ...] = ()
    workspace: int = 0
    backward_workspace: int = 0
    keep_reason: str = ""


Template = tuple[OpSpec, ...]


@dataclass
class _Writer:
    storages: list[Storage] = field(default_factory=list)
    values: list[dict[str, int]] = field(default_factory=list)
    signatures: dict[Signature, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def storage(self, nbytes: int, component: str = "activation") -> int:
        self.storages.append(Storage(nbytes=nbytes, component=component))
        return len(self.storages) - 1

    def value(self, storage: int, op: int = -1, output: int = 0) -> int:
        self.values.append({"storage": storage, "op": op, "output": output, "overwritten": 0})
        return len(self.values) - 1

    def signature(self, name: str, ms: float, workspace: int) -> int:
        return self.signatures.setdefault(Signature(name=name, ms=ms, workspace_bytes=workspace), len(self.signatures))

    def event(self, kind: EventKind, a: int = 0) -> None:
        self.events.append(Event(kind, a))


def profile_of(
    templates: Sequence[Template],
    row: Sequence[int],
    *,
    mode_ms: float = 0.0,
    tape_ms: float = 0.0,
    weight_bytes: int = 64,
    optimizer_bytes: int = 32,
    correction: int = 0,
    margin: int = 0,
    gradient_bytes: int = 8,
    hold_streams: bool = False,
) -> Profile:
    """The profile of a step that runs `templates[i]` for each i of `row`.

    Storages die after their last use in forward (a stream after the next region, or with `hold_streams` after forward).
    """
    w = _Writer()
    weight = w.value(w.storage(weight_bytes, "parameters"))
    stream = w.value(w.storage(16, "batch"))
    shared = stream
    regions: list[Region] = []
    last_use: dict[int, int] = {}
    pending: list[tuple[int, list[int]]] = []
    for place, template in enumerate(row):
        first = len(w.ops)
        w.event(EventKind.ENTER, place)
        own: list[int] = []

        def find(source: Source, own: list[int] = own, stream: int = stream, shared: int = shared) -> int:
            if isinstance(source, Own):
                return own[source.place]
            return {STREAM: stream, SHARED: shared, WEIGHT: weight}[source]

        for spec in templates[template]:
            op = len(w.ops)
            reads = tuple(find(source) for source in spec.reads)
            mutates = tuple(find(source) for source in spec.mutates)
            made = []
            for output, nbytes in enumerate(spec.makes):
                storage = w.storage(nbytes)
                w.event(EventKind.ALLOC, storage)
                made.append(w.value(storage, op, output))
            for output, value in enumerate(mutates):
                w.values[value]["overwritten"] = 1
                made.append(w.value(w.values[value]["storage"], op, -1 - output))
            w.ops.append(
                Op(
                    signature=w.signature(f"op{len(spec.makes)}{spec.keep_reason}", spec.ms, spec.workspace),
                    inputs=reads,
                    outputs=tuple(made),
                    mutates=mutates,
                    keep_reason=spec.keep_reason,
                )
            )
            own += made
            w.event(EventKind.OP, op)
            for value in (*reads, *made):
                last_use[w.values[value]["storage"]] = len(w.events) - 1
            saved = []
            for source in spec.saves:
                w.slots.append(Slot(value=find(source), region=place))
                saved.append(len(w.slots) - 1)
                w.event(EventKind.SAVE, saved[-1])
            pending.append((w.signature("backward", spec.ms * 2, spec.backward_workspace), saved))
        w.event(EventKind.EXIT, place)
        regions.append(Region(key=f"layers.{place}#0", first_op=first, op_count=len(w.ops) - first, class_id=template))
        if own:
            stream = own[-1]
            if place == 0:
                shared = own[0]
            last_use[w.values[stream]["storage"]] = len(w.events) - 1
    if hold_streams:
        last_use[w.values[stream]["storage"]] = len(w.events)
    forward = _with_frees(w, last_use)
    w.events = forward
    w.event(EventKind.BACKWARD)
    gradient = w.storage(gradient_bytes)
    w.event(EventKind.ALLOC, gradient)
    for signature, saved in reversed(pending):
        for slot in saved:
            w.event(EventKind.UNPACK, slot)
        following = w.storage(gradient_bytes)
        w.event(EventKind.ALLOC, following)
        w.event(EventKind.OTHER_OP, signature)
        for slot in saved:
            w.event(EventKind.RELEASE, slot)
        w.event(EventKind.FREE, gradient)
        gradient = following
    w.event(EventKind.FREE, gradient)
    w.event(EventKind.OPTIMIZER)
    temporary = w.storage(optimizer_bytes)
    w.event(EventKind.ALLOC, temporary)
    w.event(EventKind.OTHER_OP, w.signature("adamw", 0.5, 4))
    w.event(EventKind.FREE, temporary)
    baseline = {"parameters": weight_bytes, "gradients": weight_bytes, "batch": 16}
    return Profile(
        model="Toy", fingerprint="0", batch="16 bytes", device="cpu", torch_version="0", threads=1,
        baseline=baseline, storages=tuple(w.storages),
        values=tuple(
            Value(storage=v["storage"], op=v["op"], output=v["output"], overwritten=bool(v["overwritten"]))
            for v in w.values
        ),
        signatures=tuple(w.signatures), ops=tuple(w.ops), regions=tuple(regions),
        region_paths=tuple(region.key.split("#")[0] for region in regions), slots=tuple(w.slots),
        events=tuple(w.events), optimizer="AdamW", mode_ms_per_op=mode_ms, tape_ms_per_op=tape_ms,
        correction_bytes=correction, margin_bytes=margin,
    )  # fmt: skip


def _with_frees(w: _Writer, last_use: dict[int, int]) -> list[Event]:
    """Forward's events with each storage freed right after its last use (and the saves that belong to it)."""
    after: dict[int, list[int]] = {}
    for storage, time in last_use.items():
        if w.storages[storage].component == "activation":
            while time + 1 < len(w.events) and w.events[time + 1].kind == EventKind.SAVE:
                time += 1
            after.setdefault(min(time, len(w.events) - 1), []).append(storage)
    events: list[Event] = []
    for time, event in enumerate(w.events):
        events.append(event)
        events += [Event(EventKind.FREE, storage) for storage in after.get(time, ())]
    return events


def random_template(rng: random.Random, most_ops: int = 4) -> Template:
    """A small region: chains and branches, several outputs, in-place writes, keep reasons, externals."""
    ops: list[OpSpec] = []
    values = 0
    overwritten: set[int] = set()
    written: dict[int, int] = {}  # value -> the value that its storage holds now

    def pick() -> Source:
        live = [place for place in range(values) if place not in overwritten]
        choices: list[Source] = [Own(place) for place in live[-3:]]
        choices += [STREAM, *([SHARED] if rng.random() < 0.4 else []), *([WEIGHT] if rng.random() < 0.5 else [])]
        return rng.choice(choices)

    for _ in range(rng.randint(1, most_ops)):
        reads = tuple(dict.fromkeys(pick() for _ in range(rng.randint(1, 2))))
        own = [source for source in reads if isinstance(source, Own)]
        mutates = (rng.choice(own),) if own and rng.random() < 0.2 else ()
        makes = () if mutates and rng.random() < 0.8 else tuple(
            rng.randint(1, 12) * 8 for _ in range(rng.choice([1, 1, 1, 2]))
        )  # fmt: skip
        made = [Own(values + place) for place in range(len(makes) + len(mutates))]
        for source in mutates:
            overwritten.add(source.place)
            written[source.place] = values + len(makes)
        values += len(made)
        candidates: list[Source] = [*(s for s in reads if s not in mutates or rng.random() < 0.3), *made]
        saves = tuple(source for source in candidates if rng.random() < 0.6)
        ops.append(
            OpSpec(
                ms=rng.randint(1, 9) / 2,
                reads=reads,
                makes=makes,
                mutates=mutates,
                saves=saves,
                workspace=rng.choice([0, 0, 8, 40]),
                backward_workspace=rng.choice([0, 0, 16]),
                keep_reason="unknown kernel" if rng.random() < 0.12 else "",
            )
        )
    return tuple(ops)


def random_profile(seed: int, *, regions: int = 3, most_ops: int = 4) -> Profile:
    """A random small step; the same seed gives the same step."""
    rng = random.Random(seed)
    templates = [random_template(rng, most_ops) for _ in range(rng.randint(1, 2))]
    row = [rng.randrange(len(templates)) for _ in range(rng.randint(1, regions))]
    return profile_of(
        templates,
        row,
        mode_ms=rng.choice([0.0, 0.01]),
        tape_ms=rng.choice([0.0, 0.02]),
        optimizer_bytes=rng.choice([0, 32, 400]),
        correction=rng.choice([0, 0, -8, 24]),
        margin=rng.choice([0, 0, 16]),
        gradient_bytes=rng.choice([8, 40]),
        hold_streams=rng.random() < 0.3,
    )


def chain_template(length: int, nbytes: int = 64) -> Template:
    """A plain chain: each operation reads the one before and saves its result."""
    return tuple(
        OpSpec(ms=1.0 + place % 3, reads=(Own(place - 1) if place else STREAM,), makes=(nbytes,), saves=(Own(place),))
        for place in range(length)
    )


def block_template(width: int, tokens: int) -> Template:
    """A GPT-2 block with dropout as PyTorch runs it: about 45 taped operations, sizes and times in proportion."""
    b = width * tokens * 4
    specs: list[OpSpec] = []

    def add(
        ms: float, reads: tuple[Source, ...], makes: tuple[int, ...], saves: Sequence[Source | int], workspace: int = 0
    ) -> int:
        first = sum(len(spec.makes) for spec in specs)
        named = tuple(Own(first + s) if isinstance(s, int) else s for s in saves)
        specs.append(OpSpec(ms=ms, reads=reads, makes=makes, saves=named, workspace=workspace, backward_workspace=b))
        return first

    def own(place: int) -> Own:
        return Own(place)

    def norm(x: Source) -> int:
        return add(0.05, (x, WEIGHT), (b, tokens * 4, tokens * 4), (x, 1, 2))

    def linear(x: Source, factor: int = 1) -> int:
        return add(1.0 * factor, (x, WEIGHT), (b * factor,), (x,))

    def dropout(x: int) -> int:
        mask = add(0.1, (own(x),), (b // 4,), ())
        scaled = add(0.04, (own(mask),), (b,), ())
        return add(0.04, (own(x), own(scaled)), (b,), (own(scaled),))

    x: Source = STREAM
    n = norm(x)
    q, k, v = (linear(own(n)) for _ in range(3))
    copies = [add(0.03, (own(part),), (b,), ()) for part in (q, k, v)]
    scores = add(0.6, tuple(own(c) for c in copies[:2]), (b * 2,), [own(c) for c in copies[:2]])
    scaled = add(0.06, (own(scores),), (b * 2,), ())
    masked = add(0.06, (own(scaled),), (b * 2,), ())
    soft = add(0.2, (own(masked),), (b * 2,), (0,))
    dropped = dropout(soft)
    mixed = add(0.6, (own(dropped), own(copies[2])), (b,), (own(dropped), own(copies[2])))
    merged = add(0.03, (own(mixed),), (b,), ())
    projected = linear(own(merged))
    d = dropout(projected)
    h = add(0.03, (x, own(d)), (b,), ())
    n2 = norm(own(h))
    up = linear(own(n2), 4)
    parts = [up]
    for ms in (0.1, 0.1, 0.1, 0.3, 0.1, 0.1):  # gelu_new, written out
        parts.append(add(ms, (own(parts[-1]),), (b * 4,), (own(parts[-1]),)))
    gate = add(0.1, (own(parts[-1]), own(up)), (b * 4,), (own(parts[-1]), own(up)))
    down = add(4.0, (own(gate), WEIGHT), (b,), (own(gate),))
    d2 = dropout(down)
    add(0.03, (own(h), own(d2)), (b,), ())
    return tuple(specs)


def gpt_profile(layers: int, width: int = 768, tokens: int = 1024) -> Profile:
    """Embedding, `layers` identical blocks, and a loss head with large logits."""
    b = width * tokens * 4
    embed: Template = (OpSpec(ms=0.1, reads=(WEIGHT,), makes=(b,), saves=()),)
    head: Template = (
        OpSpec(ms=0.05, reads=(STREAM, WEIGHT), makes=(b, 4096, 4096), saves=(STREAM, Own(1), Own(2))),
        OpSpec(ms=8.0, reads=(Own(0), WEIGHT), makes=(16 * b,), saves=(Own(0),)),
        OpSpec(ms=1.0, reads=(Own(3),), makes=(16 * b,), saves=(Own(4),), backward_workspace=16 * b),
        OpSpec(ms=0.1, reads=(Own(4),), makes=(64,), saves=(Own(4), Own(5))),
    )
    return profile_of(
        [embed, block_template(width, tokens), head],
        [0, *([1] * layers), 2],
        mode_ms=0.002,
        tape_ms=0.01,
        weight_bytes=4 * b,
        optimizer_bytes=4 * b,
        gradient_bytes=b,
    )
