"""Files and folders appear whole or not at all, whatever happens in between, and every refusal is a sentence."""

from __future__ import annotations

import errno
import itertools
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

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
    monkeypatch.setattr(files, "_exchanged", lambda *names: False)

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

    assert refusal(lambda: write(path)) == f"{path} is a file: give the name of a folder"
    assert refusal(lambda: write(path / "below")).startswith(f"{path / 'below'} could not be written (")
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["file"]


# What stands at the place


def special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.fspath(path))
    else:
        path.mkdir()


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "behind a link"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_what_is_no_file_is_not_replaced_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, linked: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    there, entered = Path("there"), []
    special(there, kind)
    before = there.lstat()
    path = Path("link") if linked else there
    if linked:
        path.symlink_to(there)

    def write() -> None:
        with files.replacing(path):
            entered.append(True)

    assert refusal(write) == f"{path} is a {kind}: give the name of a file"
    assert not entered
    assert (there.lstat().st_ino, there.lstat().st_mode) == (before.st_ino, before.st_mode)
    if kind != "folder":
        assert refusal(lambda: files.check_folder_place(path)) == f"{path} is a {kind}: give the name of a folder"


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "real", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to("far/real")
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == link.read_text() == "new"
    assert names(tmp_path / "far") == ["real"]


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        with files.replacing_folder(tmp_path / "link", frozenset({"a"})) as new:
            files.write_text(new / "a", "new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"]
    assert names(tmp_path / "real") == ["a"]


# Kills


def write_and_die(at: int, exchange: bool, what: str, place: Path) -> NoReturn:
    """In a process of its own, which ends at its nth call of the disk."""
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os._exit(9)
            return real(*args, **options)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    files._exchanged = dying(files._exchanged) if exchange else lambda *names: False
    write(what, place, "new")
    os._exit(0)


def write(what: str, place: Path, text: str) -> None:
    if what == "folder":
        with files.replacing_folder(place, frozenset("ab")) as new:
            for name in "ab":
                files.write_text(new / name, text)
    else:
        with files.replacing(place) as beside:
            beside.write_text(text)
            beside.with_name("a.data").write_text(text)


@pytest.mark.filterwarnings("ignore:This process")  # a fork beside torch's threads, which it does not use
@pytest.mark.parametrize(("what", "exchange"), [("folder", True), ("folder", False), ("files", False)])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, what: str, exchange: bool) -> None:
    """Never a mixture; where there is nothing for a moment, who comes next finds the whole."""
    place, both = tmp_path / "a", [tmp_path / "a", tmp_path / "a.data"]
    if what == "folder":
        both = [place / "a", place / "b"]
    for number in itertools.count(1):
        write(what, place, "old")
        assert [name for name in names(tmp_path) if name.startswith(".")] == []
        child = os.fork()
        if child == 0:
            write_and_die(number, exchange, what, place)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not exchange and not place.exists():
            files.finish(place)
            assert place.exists()
        assert len({each.read_text() for each in both}) == 1
        if code == 0:
            break
        assert code == 9
    assert {each.read_text() for each in both} == {"new"}
    assert number > 8


def test_several_at_once_do_not_take_each_others_scratch_for_that_of_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks are of open files, so that threads stand for processes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    interval = sys.getswitchinterval()

    def work(_: int) -> bool:
        for _ in range(50):
            with files.scratch("undo-") as folder:
                (folder / "file").touch()
                assert names(folder) == ["file"]
        return True

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(6)))
    finally:
        sys.setswitchinterval(interval)
    assert names(tmp_path) == []


def test_scratch_of_killed_processes_is_cleared_and_that_of_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    (tmp_path / "undo-dead").mkdir()
    (tmp_path / "undo-dead" / "weights").touch()
    (tmp_path / "other").mkdir()
    with files.scratch("undo-") as first, files.scratch("undo-") as second:
        assert {path.name for path in tmp_path.iterdir()} == {"other", first.name, second.name}
    assert names(tmp_path) == ["other"]


def test_a_file_that_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with files.replacing(path) as beside:
        beside.write_text("first")
        assert refusal(lambda: files.write_text(path, "second")) == (
            f"another process is writing {path}: let it end, or choose another name"
        )
    assert path.read_text() == "first"


@pytest.mark.filterwarnings("ignore:This process")
def test_one_process_at_a_time_works_in_a_folder_and_the_next_is_told_which(tmp_path: Path) -> None:
    def second() -> str:
        """What another process is told."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with files.only_one(tmp_path):
                    os.write(writing, b"it may")
            except StoreError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with open(reading, encoding="utf-8") as told:
            return told.read()

    (tmp_path / ".checkpoint.part").mkdir()
    (tmp_path / ".lock").write_text("process 1 on mars (since long ago)")  # of a killed process
    with files.only_one(tmp_path):
        assert names(tmp_path) == [".lock"]
        assert re.fullmatch(
            rf"process {os.getpid()} on \S+ \(since [-\d]+ [:\d]+\) trains in {tmp_path}: wait for it, stop it, or "
            "choose another --out",
            second(),
        )
    assert names(tmp_path) == []
    assert second() == "it may"
