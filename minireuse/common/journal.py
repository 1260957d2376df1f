"""A record of long work on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minireuse.files import parse_json

START = b'{"settings": '


class Journal:
    """Results by key, appended to a file as they come: JSON lines, the first of which names what the work was.

    A line that a kill left unfinished is dropped, at the cost of one result. Without a path it only remembers.
    Raises: ValueError for a file that is no journal, or one of a run with other settings.
    """

    def __init__(self, path: Path | None = None, settings: dict[str, Any] | None = None) -> None:
        self.records: dict[str, Any] = {}
        self._path = path
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            self._read(path, settings)
        else:
            self._append({"settings": settings})

    def _read(self, path: Path, settings: dict[str, Any] | None) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        unfinished = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        records = [_record(line) for line in lines]
        if not records and START.startswith(unfinished[: len(START)]):  # killed, or out of space, at its very beginning
            os.truncate(path, 0)
            self._append({"settings": settings})
            return
        if not records or "settings" not in records[0]:
            raise ValueError(f"{path} is not a journal; remove it, or name another output")
        if records[0]["settings"] != json.loads(json.dumps(settings)):
            raise ValueError(f"{path} belongs to a run with other settings; remove it, or name another output")
        for number, record in enumerate(records[1:], start=2):
            if not isinstance(record.get("key"), str) or "value" not in record:
                raise ValueError(f"{path} line {number} holds no key and value; remove that line, or the file")
            self.records[record["key"]] = record["value"]
        if unfinished:
            os.truncate(path, path.stat().st_size - len(unfinished))

    def add(self, key: str, value: Any) -> None:
        """Remember a result, on disk before this returns."""
        self.records[key] = value
        if self._path is not None:
            self._append({"key": key, "value": value})

    def known(self, key: str, work: Callable[[], Any]) -> Any:
        """The result under a key; where there is none the work is done now, and remembered."""
        if key not in self.records:
            self.add(key, work())
        return self.records[key]

    def _append(self, record: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
