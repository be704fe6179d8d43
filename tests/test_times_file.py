"""Measured times on the disk: what was written is read, what is damaged is not, and nobody's times are lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynrank_fx.times_file import default_cache, key_of, read_times, write_times


def test_what_is_written_is_read_and_what_others_wrote_stays(tmp_path: Path) -> None:
    path = tmp_path / "some" / "times.json"
    write_times(path, {"a": [1.0, 0.5, 0.5], "b": None})
    write_times(path, {"c": [2.0, 1.0, 0.5]})
    assert read_times(path) == {"a": [1.0, 0.5, 0.5], "b": None, "c": [2.0, 1.0, 0.5]}


def test_what_is_damaged_or_not_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert read_times(path) == read_times(None) == {}
    write_times(path, {"a": [1.0, 0.5, 0.5]})
    whole = path.read_text()
    for damaged in ("", "3", "[]", "no JSON", whole.replace("1.0", "1.5"), '{"times": {"a": [1, 2]}}'):
        path.write_text(damaged)
        assert read_times(path) == {}


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_times(tmp_path / "file" / "times.json", {"a": None})
    write_times(None, {"a": None})


def test_the_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "dynrank-fx" / "times.json"


def test_a_key_tells_things_apart() -> None:
    assert key_of(["a", (1, 2)]) == key_of(["a", [1, 2]]) != key_of(["a", [1, 3]])
