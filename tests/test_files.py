"""Files appear whole, under a free name, and leave nothing beside them."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from minireuse.files import read_lines, read_text, write_whole


def test_the_first_free_name_is_taken(tmp_path: Path) -> None:
    names = [tmp_path / "sub" / f"{i}.png" for i in range(3)]
    assert [write_whole(names, bytes([i])) for i in range(3)] == names
    assert [p.read_bytes() for p in names] == [b"\0", b"\1", b"\2"]
    with pytest.raises(FileExistsError, match="taken"):
        write_whole(names, b"x")
    assert write_whole(names, b"x", overwrite=True) == names[0]
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["0.png", "1.png", "2.png"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(names[1].stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "a.png"
    monkeypatch.setattr("minireuse.files.os.link", full)
    with pytest.raises(OSError, match="No space"):
        write_whole([target], b"x")
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_hard_links_no_file_is_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("minireuse.files.os.link", refused)
    names = [tmp_path / "a.png", tmp_path / "b.png"]
    assert [write_whole(names, data) for data in (b"x", b"y")] == names
    assert [p.read_bytes() for p in names] == [b"x", b"y"]


def test_a_neighbours_part_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_text("mine")
    write_whole([tmp_path / "a.png"], b"x")
    assert (tmp_path / "a.part").read_text() == "mine"


def test_blank_lines_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a circle\n\n  \na stär\n", encoding="utf-8")
    assert read_lines(tmp_path / "p.txt") == ["a circle", "a stär"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.txt").write_bytes("a stär\r\na 圆".encode(encoding))
    assert read_lines(tmp_path / "p.txt") == ["a stär", "a 圆"]


def test_big_endian_text_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xfe\xff" + "ein stär".encode("utf-16-be"))
    assert read_text(tmp_path / "p.txt") == "ein stär"


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a\u2028b\x0bc\x85d\re\r\nf\n\ng".encode())
    assert read_lines(tmp_path / "p.txt") == ["a\u2028b\x0bc\x85d", "e", "f", "g"]


@pytest.mark.parametrize("data", [b"a st\xe4r", b"\xff\xfea", b"ab\0", b"\0\0\0\x10PNG"])
def test_what_is_no_text_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"p\.txt is not text in UTF-8 or UTF-16 \(.*\); save it as UTF-8"):
        read_text(tmp_path / "p.txt")
