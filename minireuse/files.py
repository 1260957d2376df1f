"""Files: where the shipped model lies, and writing so that nothing is lost, whole or not at all, never over another."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Byte-order marks, the longer of two that begin alike first. These codecs take the mark away.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def write_whole(targets: Iterable[Path], data: bytes, *, overwrite: bool = False) -> Path:
    """Write `data` under the first of `targets` that is free (or the first at all), and say which one it was.

    The file appears under its name only once it is whole, and two processes that write at once never meet in one name.
    Raises: OSError; FileExistsError where no target is free.
    """
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(part, 0o666 & ~_umask())
            if overwrite:
                os.replace(part, target)
            else:
                _rename_to_free_name(part, target)
            return target
        except FileExistsError:
            continue
        finally:
            Path(part).unlink(missing_ok=True)
    raise FileExistsError("every file name to write to is taken; give another one, or allow overwriting")


def _rename_to_free_name(part: str, target: Path) -> None:
    """Raises: FileExistsError where the name is taken, which a rename alone would not find out."""
    try:
        os.link(part, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        target.touch(exist_ok=False)  # a file system without hard links: take the name first
        os.replace(part, target)


def _umask() -> int:
    """The permissions that new files do not get; temporary files are made private, results are not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 as some editors save it. A byte-order mark is no part of the text.

    Raises: OSError; ValueError for what is no such text.
    """
    data = path.read_bytes()
    try:
        text = data.decode(_encoding_of(data))
        fault = "it holds zero characters" if "\0" in text else ""
    except UnicodeDecodeError as error:
        fault = error.reason
    if fault:
        raise ValueError(f"{path} is not text in UTF-8 or UTF-16 ({fault}); save it as UTF-8")
    return text


def _encoding_of(data: bytes) -> str:
    """By the byte-order mark; without one, by where the zeros of a text that begins in ASCII lie."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    if data[:1] == b"\0":
        return "utf-16-be"
    return "utf-16-le" if data[1:2] == b"\0" else "utf-8"


def lines_of(text: str) -> list[str]:
    """Lines as files end them. Unlike `str.splitlines`, this leaves U+2028 and the like inside a line."""
    return re.split("\r\n?|\n", text)


def digest_of(path: Path) -> str:
    """Sixteen hexadecimal digits that tell a file's bytes from others. Raises: OSError."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises: as `read_text`."""
    return [line for line in lines_of(read_text(path)) if line.strip()]


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises: ValueError, for what is nested beyond Python's own depth, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shown(value: Any, most: int = 80) -> str:
    """A value as an error message shows it: not the whole of a file that holds nonsense."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."


def shipped_model() -> Path:
    """The folder of the model that comes with the package: inside it when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "weights"


def read_prompts(path: Path | None, model: Path | None, purpose: str, count: int, options: str) -> list[str]:
    """The lines of a file, `count` at least, by default of the shipped prompts for this purpose.

    model: None for the shipped one. options: of the command line, that ask for the count.
    Raises: ValueError where there are fewer, or another model has none; OSError.
    """
    if path is None and model is not None:
        raise ValueError(f"this model has no {purpose} prompts of its own; give --prompts-file, one prompt per line")
    path = path or shipped_model() / "prompts" / f"{purpose}.txt"
    prompts = read_lines(path)
    if count < 1 or len(prompts) < count:
        raise ValueError(f"{path} holds {len(prompts)} prompts, but {count} are needed; lower {options}")
    return prompts
