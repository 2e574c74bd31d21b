"""Convert records to versioned JSON and back.

Generic over frozen dataclasses, named tuples, integer enums, tuples, string-keyed mappings, ``int``, ``float``,
``str``, ``bool`` and ``X | None``, driven by the records' own type hints.  It lies below `records` and knows none of
them.

The document is the record as an object, with ``"schema": "tightfit.<class>/1"`` in front.  Dataclasses are objects
with every field (no defaults are left out), named tuples are arrays, enums are their numbers.  Fields that the record
computes itself (``init=False``) are not stored.

Reading is strict: another schema, a missing or unknown or repeated key, a value of another type, NaN or infinity are
refused with `PlanMismatch`.  A record may have a method ``check() -> None`` that raises ``ValueError`` for what types
cannot say, such as an index beyond its table; it is called on everything that is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import secrets
import types
from collections.abc import Callable, Mapping
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tightfit.errors import PlanMismatch

#: Version of every schema: raised when a document that older code wrote can no longer be read.
SCHEMA_VERSION = 1
#: In a field's metadata: it came later, has a default, and stands in documents where it differs from that, so that code
#: from before it reads all others.
ADDED = "added"
#: What schemas began with until 0.1, when the package was called recollect.
_FORMER_NAME = "recollect."

R = TypeVar("R")


def schema_name(cls: type) -> str:
    """Return what the document's ``schema`` says: ``tightfit.plan/1``."""
    return f"tightfit.{cls.__name__.lower()}/{SCHEMA_VERSION}"


def encode(record: object) -> dict[str, Any]:
    """Return the JSON document of a record."""
    cls: Any = type(record)
    return {"schema": schema_name(cls), **_codec(cls).encode(record)}


def decode(cls: type[R], document: object) -> R:
    """Return the record in a JSON document. Raises `PlanMismatch` if it is not one of this class and version."""
    try:
        return _decode_document(cls, document)
    except _Refused as error:
        raise _mismatch(cls, "the document", error) from error


def save(record: object, path: str | Path) -> None:
    """Write a record as JSON, whole or not at all: another process never sees half a file.

    Raises:
        ValueError: the record holds NaN or infinity.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    text = json.dumps(encode(record), allow_nan=False, separators=(",", ":"))
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def load(cls: type[R], path: str | Path) -> R:
    """Read a record that `save` wrote. Raises `PlanMismatch` if the file is not one, or cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
        return _decode_document(cls, document)
    except OSError as error:
        raise _mismatch(cls, str(path), error.strerror or error) from error
    except UnicodeDecodeError as error:
        raise _mismatch(cls, str(path), "it is not text") from error
    except json.JSONDecodeError as error:
        raise _mismatch(cls, str(path), f"it is not whole JSON ({error})") from error
    except RecursionError as error:
        raise _mismatch(cls, str(path), "its JSON is nested too deeply") from error
    except ValueError as error:
        raise _mismatch(cls, str(path), error) from error


def json_schema(cls: type) -> dict[str, Any]:
    """Return a JSON Schema (2020-12) of a record class's documents."""
    definitions: dict[str, Any] = {}
    body = _codec(cls).schema(definitions)
    if "$ref" in body:
        body = definitions.pop(cls.__name__)
    properties = {"schema": {"const": schema_name(cls)}, **body["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": schema_name(cls),
        **body,
        "properties": properties,
        "required": ["schema", *body["required"]],
        **({"$defs": dict(sorted(definitions.items()))} if definitions else {}),
    }


class _Refused(ValueError):
    """A document is not what its class says; the message tells where and why."""


class _Former(_Refused):
    """A document was written under the package's former name."""


def _mismatch(cls: type, name: str, why: object) -> PlanMismatch:
    kind = cls.__name__.lower()
    if isinstance(why, _Former):
        return PlanMismatch(
            f"{name} was written by recollect, as tightfit was called until 0.1 (its schema is {why}). "
            f"What it holds is not what a {kind} holds today, so it cannot be read. "
            "Measure and solve again with this version."
        )
    return PlanMismatch(
        f"{name} is not a {kind} that this version of tightfit can use: {why}. "
        f"It is missing, damaged, of another kind or of another version. Give the right file, or make the {kind} again."
    )


def _no_constant(text: str) -> float:
    raise _Refused(f"it holds {text}, which is not a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return result


def _decode_document(cls: type[R], document: object) -> R:
    if not isinstance(document, dict):
        raise _Refused(f"its top level is {_kind_of(document)}, not an object")
    found, wanted = document.get("schema"), schema_name(cls)
    if isinstance(found, str) and found.startswith(_FORMER_NAME):
        raise _Former(repr(found))
    if found != wanted:
        raise _Refused(f"its schema is {found!r}, not {wanted!r}")
    kind: Any = cls
    record: R = _codec(kind).decode({key: value for key, value in document.items() if key != "schema"}, "")
    check = getattr(record, "check", None)
    if check is not None:
        try:
            check()
        except ValueError as error:
            raise _Refused(str(error)) from error
    return record


@dataclasses.dataclass(frozen=True, slots=True)
class _Codec:
    """How one type is written, read and described."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any, str], Any]
    """Takes the value and where it stands in the document; raises `_Refused`."""
    schema: Callable[[dict[str, Any]], dict[str, Any]]
    """Takes the definitions so far, adds to them what it needs, and returns this type's schema."""


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"{value!r:.40}")


def _wrong(where: str, value: object, wanted: str) -> _Refused:
    return _Refused(f"{where or 'the document'} is {_kind_of(value)}, not {wanted}")


@cache
def _codec(kind: Any) -> _Codec:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _optional_codec(kind)
    if origin is tuple:
        return _tuple_codec(get_args(kind))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping_codec(*get_args(kind))
    if kind in _SCALARS:
        return _scalar_codec(kind)
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return _enum_codec(kind)
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _named_tuple_codec(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass_codec(kind)
    raise TypeError(f"a record's field has type {kind!r}, which the codec does not know. Use one that it lists.")


_SCALARS: dict[Any, tuple[str, str]] = {
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    str: ("string", "a string"),
    bool: ("boolean", "a truth value"),
}


def _scalar_codec(kind: type) -> _Codec:
    name, wanted = _SCALARS[kind]

    def read(value: Any, where: str) -> Any:
        if type(value) is kind:
            if isinstance(value, float) and not math.isfinite(value):
                raise _Refused(f"{where} is {value}, not a finite number")
            return value
        if kind is float and type(value) is int:
            try:
                return float(value)
            except OverflowError as error:
                raise _Refused(f"{where} is too large") from error
        raise _wrong(where, value, wanted)

    write = float if kind is float else _same
    return _Codec(write, read, lambda definitions: {"type": name})


def _same(value: Any) -> Any:
    return value


def _optional_codec(kind: Any) -> _Codec:
    inner = [part for part in get_args(kind) if part is not type(None)]
    if len(inner) != 1:
        raise TypeError(f"a record's field has type {kind!r}; of unions, the codec knows only X | None.")
    codec = _codec(inner[0])
    return _Codec(
        lambda value: None if value is None else codec.encode(value),
        lambda value, where: None if value is None else codec.decode(value, where),
        lambda definitions: {"anyOf": [codec.schema(definitions), {"type": "null"}]},
    )


def _tuple_codec(parts: tuple[Any, ...]) -> _Codec:
    if len(parts) != 2 or parts[1] is not Ellipsis:
        return _row_codec(parts, tuple, [str(place) for place in range(len(parts))])
    item = _codec(parts[0])
    write, read_item = item.encode, item.decode

    def read(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise _wrong(where, value, "an array")
        return tuple([read_item(part, f"{where}[{place}]") for place, part in enumerate(value)])

    return _Codec(
        lambda value: [write(part) for part in value],
        read,
        lambda definitions: {"type": "array", "items": item.schema(definitions)},
    )


def _row_codec(parts: tuple[Any, ...], build: Callable[[list[Any]], Any], names: list[str]) -> _Codec:
    """Return the codec of a fixed number of values in an array."""
    codecs = [_codec(part) for part in parts]

    def read(value: Any, where: str) -> Any:
        if type(value) is not list or len(value) != len(codecs):
            raise _wrong(where, value, f"an array of {len(codecs)}")
        return build([codec.decode(part, where) for codec, part in zip(codecs, value, strict=True)])

    def schema(definitions: dict[str, Any]) -> dict[str, Any]:
        items = [{**codec.schema(definitions), "title": name} for codec, name in zip(codecs, names, strict=True)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    return _Codec(lambda value: [c.encode(p) for c, p in zip(codecs, value, strict=True)], read, schema)


def _mapping_codec(key: Any, item_type: Any) -> _Codec:
    if key is not str:
        raise TypeError("a record's mapping has keys that are not strings, which JSON cannot hold.")
    item = _codec(item_type)

    def read(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise _wrong(where, value, "an object")
        return {name: item.decode(part, f"{where}.{name}") for name, part in value.items()}

    return _Codec(
        lambda value: {name: item.encode(part) for name, part in value.items()},
        read,
        lambda definitions: {"type": "object", "additionalProperties": item.schema(definitions)},
    )


def _enum_codec(kind: type[IntEnum]) -> _Codec:
    members = {member.value: member for member in kind}

    def read(value: Any, where: str) -> Any:
        if type(value) is not int or value not in members:
            raise _wrong(where, value, f"a {kind.__name__}")
        return members[value]

    names = ", ".join(f"{member.value} {member.name}" for member in kind)
    return _Codec(int, read, lambda definitions: {"enum": sorted(members), "description": f"{kind.__name__}: {names}"})


def _named_tuple_codec(kind: Any) -> _Codec:
    hints = get_type_hints(kind)
    row = _row_codec(tuple(hints[name] for name in kind._fields), kind._make, list(kind._fields))
    return _Codec(row.encode, row.decode, _defined(kind, row.schema))


def _dataclass_codec(kind: Any) -> _Codec:
    hints = get_type_hints(kind)
    codecs = {spec.name: _codec(hints[spec.name]) for spec in dataclasses.fields(kind) if spec.init}
    names = set(codecs)
    added = {spec.name: spec.default for spec in dataclasses.fields(kind) if spec.metadata.get(ADDED)}

    def write(record: Any) -> Any:
        given = {name: getattr(record, name) for name in codecs}
        return {
            name: codecs[name].encode(value)
            for name, value in given.items()
            if name not in added or value != added[name]
        }

    def read(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise _wrong(where, value, "an object")
        missing, unknown = sorted(names - value.keys() - added.keys()), sorted(value.keys() - names)
        if missing or unknown:
            trouble = f"lacks {missing[0]!r}" if missing else f"has an unknown key {unknown[0]!r}"
            raise _Refused(f"{where or 'the document'} {trouble}")
        prefix = f"{where}." if where else ""
        return kind(
            **{name: codec.decode(value[name], f"{prefix}{name}") for name, codec in codecs.items() if name in value}
        )

    def schema(definitions: dict[str, Any]) -> dict[str, Any]:
        properties = {name: codec.schema(definitions) for name, codec in codecs.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name not in added],
            "additionalProperties": False,
        }

    return _Codec(write, read, _defined(kind, schema))


def _defined(
    kind: type, schema: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the schema of a class, put once among the definitions and referred to by name."""

    def refer(definitions: dict[str, Any]) -> dict[str, Any]:
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}
            definition = {"description": inspect.getdoc(kind) or "", **schema(definitions)}
            definitions[kind.__name__] = definition
        return {"$ref": f"#/$defs/{kind.__name__}"}

    return refer
