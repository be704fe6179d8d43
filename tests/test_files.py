"""Files and folders appear whole or not at all, whatever happens in between, and every refusal is a sentence."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynrank_fx import files
from dynrank_fx.errors import StoreError


def refusal(run: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        run()
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stop(BaseException):
    """What no code expects."""


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Files


def test_a_text_takes_the_place_of_the_old_one_and_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "t").write_text("old")
    files.write_text(tmp_path / "t", "ranks für ⟨W⟩")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "ranks für ⟨W⟩"
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1
    assert names(tmp_path) == ["plain", "t"]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("step", ["fsync", "replace", "the writing itself"])
def test_an_interruption_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, alone: bool
) -> None:
    path = tmp_path / "t"
    path.write_text("old")

    def stop(*args: Any) -> None:
        raise Stop

    def write() -> None:
        with files.replacing(path, alone=alone) as beside:
            beside.write_text("new")
            if step == "the writing itself":
                stop()

    if step != "the writing itself":
        monkeypatch.setattr(os, step, stop)
    with pytest.raises(Stop):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["t"]


def test_what_is_written_beside_a_file_goes_along_and_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, replace = [], os.replace

    def noting(source: Any, target: Any) -> None:
        moved.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", noting)
    with files.replacing(tmp_path / "graph") as beside:
        beside.write_text("graph")
        for name in ("a.data", "z.data"):
            beside.with_name(name).write_text(name)
            beside.with_name(name).chmod(0o600)
    assert {path.name for path in moved[:2]} == {"a.data", "z.data"}
    assert moved[2] == tmp_path / "graph"
    assert names(tmp_path) == ["a.data", "graph", "z.data"]
    (tmp_path / "plain").touch()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


def test_a_killed_writer_leaves_nothing_that_the_next_one_does_not_clear_away(tmp_path: Path) -> None:
    (tmp_path / ".t.part").mkdir()
    (tmp_path / ".t.part" / "t").write_text("half")
    files.write_text(tmp_path / "t", "whole")
    assert names(tmp_path) == ["t"]


def test_two_writers_of_one_file_do_not_get_in_each_others_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one, of another process, writes while this one does."""
    path = tmp_path / "cache"
    with files.replacing(path, alone=False) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 0)
        with files.replacing(path, alone=False) as theirs:
            theirs.write_text("theirs")
            assert mine.read_text() == "mine"
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["cache"]


def test_a_full_disk_is_a_sentence_that_names_the_file_or_the_place_it_is_meant_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, why = tmp_path / "t", "could not be written (No space left on device); what was there before is unchanged"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    assert refusal(lambda: files.write_text(path, "new")) == f"{path} {why}"
    assert refusal(lambda: files.write_text(path, "new", final=Path("net/t"))) == f"net/t {why}"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["t"]


@pytest.mark.parametrize("parent", ["no/such/folder", "a file"])
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path, parent: str) -> None:
    (tmp_path / "a file").touch()
    path = tmp_path / parent / "t"
    message = refusal(lambda: files.write_text(path, "text"))
    assert message.startswith(f"{path} could not be written (")
    assert "rror" not in message
    assert names(tmp_path) == ["a file"]


# Folders


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "made"
    with files.replacing_folder(path, frozenset({"a", "b"})) as new:
        files.write_text(new / "a", "1")
        assert not path.exists()
        files.write_text(new / "b", "2")
    assert {name: (path / name).read_text() for name in names(path)} == {"a": "1", "b": "2"}
    assert names(path.parent) == ["made"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode)


def test_a_folder_of_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.mkdir()
    (path / "b").write_text("old")
    with files.replacing_folder(path, frozenset({"a", "b"})) as new:
        files.write_text(new / "a", "new")
    assert names(path) == ["a"]
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize(
    "error",
    [Stop(), ValueError("mine"), StoreError("mine"), OSError(errno.ENOSPC, "full")],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("there", [True, False], ids=["over an old one", "new"])
def test_a_folder_that_fails_midway_changes_nothing(tmp_path: Path, error: BaseException, there: bool) -> None:
    path = tmp_path / "made"
    if there:
        path.mkdir()
        (path / "a").write_text("old")

    def write() -> None:
        with files.replacing_folder(path, frozenset({"a"})) as new:
            files.write_text(new / "a", "new")
            raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
        write()
    assert names(tmp_path) == (["made"] if there else [])
    if there:
        assert (path / "a").read_text() == "old"


def test_a_disk_that_is_full_in_the_middle_of_a_folder_names_the_file_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with files.replacing_folder(tmp_path / "made", frozenset()) as new:
            monkeypatch.setattr(os, "fsync", full)
            files.write_text(new / "a", "text", final=path)

    path = tmp_path / "made" / "a"
    assert (
        refusal(write) == f"{path} could not be written (No space left on device); what was there before is unchanged"
    )
    assert names(tmp_path) == []


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "made", os.rename
    path.mkdir()
    (path / "a").write_text("old")

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)

    def write() -> None:
        with files.replacing_folder(path, frozenset({"a"})) as new:
            files.write_text(new / "a", "new")

    assert refusal(write) == f"{path} could not be written (No space left on device); what was there is unchanged"
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["made"]


def test_somebody_elses_files_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    (path / "a").write_text("old")
    entered = []

    def write() -> None:
        with files.replacing_folder(path, frozenset({"a"})):
            entered.append(True)

    assert refusal(write) == f"{path} holds thesis.txt, which is not ours to replace; choose an empty or a new folder"
    assert not entered
    assert names(path) == ["a", "thesis.txt"]


def test_a_folder_in_the_place_of_a_file_or_below_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")

    def write(folder: Path) -> None:
        with files.replacing_folder(folder, frozenset()):
            pass

    assert refusal(lambda: write(path)) == f"{path} is a file; give the name of a folder"
    assert refusal(lambda: write(path / "below")).startswith(f"{path / 'below'} could not be written (")
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["file"]
