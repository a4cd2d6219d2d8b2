"""Files are written whole or not at all, and never over what is no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tapt.core.errors import InputError
from tapt.files import check_output, write_file


def test_only_a_file_or_a_free_name_is_replaced(tmp_path: Path):
    path = tmp_path / "a.png"
    for content in (b"one", b"two"):
        write_file(path, content)
        assert path.read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for other in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        with pytest.raises(InputError, match="is not a regular file"):
            write_file(other, b"x")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("/dev/null").is_char_device()


def test_a_link_is_replaced_and_not_what_it_points_at(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "link").symlink_to("a")
    write_file(check_output(tmp_path / "link"), b"two")
    assert (tmp_path / "a").read_bytes() == b"one"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"x")
    Path("folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder", "reason"),
    [
        ("", False, "the name is empty"),
        ("file/deep/x", True, "a part of its path is a file"),
        ("file/x.png", False, "a part of its path is a file"),
        ("file", True, "it is not a regular folder"),
        ("folder", False, "it is a folder"),
        ("missing/x.png", False, "its folder does not exist"),
        ("x" * 300, False, "the name is too long"),
        ("a\0b", False, "the name is not a path"),
        ("~nobody-of-this-name/x", False, "the name is not a path"),
        ("/dev/null", False, "it is not a regular file"),
    ],
)
def test_outputs_that_cannot_be_written(name: str, folder: bool, reason: str, place: Path):
    with pytest.raises(InputError, match=f"cannot be written: {reason}"):
        check_output(name, folder=folder)
    assert sorted(os.listdir()) == ["file", "folder"]


def test_outputs_that_can_be_written(place: Path, monkeypatch: pytest.MonkeyPatch):
    for name, folder in (("file", False), ("new", False), (".", True), ("new/deep", True)):
        assert check_output(name, folder=folder) == Path(name)
    assert sorted(os.listdir()) == ["file", "folder"]
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    for name, folder in (("x", False), ("new/deep", True)):
        with pytest.raises(InputError, match="there is no permission"):
            check_output(name, folder=folder)
