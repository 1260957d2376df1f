"""Hostile versions of good files, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 77, 255, 2**16, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308])
WORDS = st.sampled_from(["", "0", "\0", "é★\U0001f984", "../../etc/passwd", "/dev/zero", "a" * 5000, "-", "#" * 20])
STRANGE = WORDS | st.sampled_from([None, True, False, float("nan"), float("inf"), [], {}, [[]], {"": {}}, [None] * 50])
VALUES = NUMBERS | STRANGE | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within nested lists and objects."""
    found = [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@st.composite
def json_like(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value with one to three things changed: replaced, removed, added, swapped."""
    data = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(ANYTHING)
            continue
        *above, last = path
        parent = data
        for key in above:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "double"]))
        if change == "replace":
            parent[last] = copy.deepcopy(draw(ANYTHING))  # hypothesis may hand out the same list twice
        elif change == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=12)) if change == "add" else str(last) + " "] = copy.deepcopy(parent[last])
        else:
            parent.append(copy.deepcopy(parent[last]) if change == "double" else copy.deepcopy(draw(ANYTHING)))
    return data


@st.composite
def bytes_like(draw: st.DrawFn, good: bytes) -> bytes:
    """A file with parts changed, cut, doubled, or put in; or with deep nesting where text may stand."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        change = draw(st.sampled_from(["flip", "cut", "drop", "insert", "double", "length", "nest"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at:]
        elif change == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif change == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif change == "length":  # the first eight bytes of a safetensors file are the length of its header
            data[:8] = draw(st.integers(0, 2**64 - 1) | st.sampled_from([2**60, 2**32, 2**20, 8, 0])).to_bytes(
                8, "little"
            )
        elif change == "nest":
            data[at:at] = draw(st.sampled_from([b"[" * 20_000, b'{"a":' * 5_000]))
    return bytes(data)


def text_of(good: Any) -> st.SearchStrategy[bytes]:
    """JSON as a file: changed as a value, or as bytes."""
    whole = json.dumps(good).encode()
    return json_like(good).map(lambda data: json.dumps(data).encode()) | bytes_like(whole)
