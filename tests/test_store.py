"""Files that can be trusted: whole or not at all, and never read wrong."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dynrank_fx import store
from dynrank_fx.errors import StoreError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint32,
    torch.bool,
]
INFO = {"text": "ranks für ⟨W⟩", "none": None, "list": [1, 2.5, {"deep": True}], "nothing": {}}


def refusal(run: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        run()
    return str(caught.value)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].numpy(force=True).tobytes() == b[name].numpy(force=True).tobytes()
        for name in a
    )


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_by_bit(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    value = torch.randint(2, 100, shape).to(dtype)
    store.write(tmp_path / "f", {"x": value}, INFO)
    tensors, info = store.read(tmp_path / "f")
    assert (tensors["x"].dtype, tensors["x"].shape) == (dtype, value.shape)
    assert torch.equal(tensors["x"], value)
    assert info == INFO


def test_values_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    value = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    store.write(tmp_path / "f", {"x": value}, {"loss": float("inf")})
    tensors, info = store.read(tmp_path / "f")
    assert torch.equal(tensors["x"].view(torch.int32), value.view(torch.int32))
    assert info == {"loss": float("inf")}


def test_no_tensors_at_all(tmp_path: Path) -> None:
    store.write(tmp_path / "f", {}, {})
    assert store.read(tmp_path / "f") == ({}, {})


def test_names_of_one_tensor_are_stored_once_and_come_back_as_one(tmp_path: Path) -> None:
    shared, alone = torch.nn.Parameter(torch.randn(1000)), torch.randn(1000)
    store.write(tmp_path / "f", {"a": shared, "other": alone, "b.tied": shared, "c": shared}, {})
    tensors, _ = store.read(tmp_path / "f")
    assert set(tensors) == {"a", "other", "b.tied", "c"}
    assert tensors["a"] is tensors["b.tied"] is tensors["c"]
    assert torch.equal(tensors["c"], shared.detach())
    assert torch.equal(tensors["other"], alone)
    assert (tmp_path / "f").stat().st_size < 9000


def test_views_of_one_storage_come_back_with_their_own_values(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    views = {
        "whole": base,
        "again": base[:],
        "part": base[3:9],
        "turned": base.view(4, 6).T,
        "wide": base[:1].expand(5),
    }
    store.write(tmp_path / "f", views, {})
    tensors, _ = store.read(tmp_path / "f")
    assert same(tensors, {name: view.contiguous() for name, view in views.items()})
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(views)


def test_writing_leaves_the_tensors_as_they_were(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    store.write(tmp_path / "f", {"w": weight}, {})
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.requires_grad
    assert torch.equal(store.read(tmp_path / "f")[0]["w"], weight.detach())


def test_what_was_read_may_be_written_to_without_touching_the_file(tmp_path: Path) -> None:
    store.write(tmp_path / "f", {"x": torch.ones(4)}, {})
    store.read(tmp_path / "f")[0]["x"].zero_()
    assert torch.equal(store.read(tmp_path / "f")[0]["x"], torch.ones(4))


def test_a_file_is_as_readable_to_others_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    store.write(tmp_path / "f", {"x": torch.ones(1)}, {})
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


# Damage


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    store.write(path, {"w": torch.tensor([1.5, -2.0]), "n": torch.tensor(3), "tied": torch.ones(1)}, {"rank": 4})
    return path


def test_a_flipped_bit_anywhere_is_an_error_or_harmless(small: Path) -> None:
    good, content = small.read_bytes(), store.read(small)
    refused = 0
    for position in range(len(good)):
        for bit in range(8):
            small.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            try:
                tensors, info = store.read(small)
            except StoreError:
                refused += 1
            else:
                assert same(tensors, content[0])
                assert info == content[1]
    assert refused > 7.5 * len(good)


def test_a_file_cut_at_any_length_is_an_error(small: Path) -> None:
    good = small.read_bytes()
    for length in range(len(good)):
        small.write_bytes(good[:length])
        assert "damaged" in refusal(lambda: store.read(small))


def test_bytes_after_the_end_are_an_error(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"\0" * 8)
    assert "damaged" in refusal(lambda: store.read(small))


def test_a_newer_version_says_what_to_do(small: Path) -> None:
    store.write(small, {"x": torch.ones(1)}, {}, version=3)
    assert refusal(lambda: store.read(small)) == (
        f"{small} has version 3 and this dynrank-fx reads version 2; upgrade dynrank-fx"
    )


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["bare", "of another program"])
def test_foreign_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata)
    assert refusal(lambda: store.read(path)) == f"{path} was not written by dynrank-fx, or its header is damaged"


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    assert refusal(lambda: store.read(path)) == f"there is no file {path}"
    assert "gone/deeper" in refusal(lambda: store.read(path / "deeper"))
    assert "damaged or not a safetensors file" in refusal(lambda: store.read(tmp_path))


# Whole or not at all


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stop(BaseException):
    """What no code expects."""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interruption_before_the_rename_leaves_the_old_file(
    small: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = small.read_bytes()

    def stop(*args: Any) -> None:
        raise Stop

    monkeypatch.setattr(os, step, stop)
    with pytest.raises(Stop):
        store.write(small, {"w": torch.zeros(1000)}, {})
    assert small.read_bytes() == before
    assert files(small.parent) == ["small"]


def test_a_kill_before_the_rename_leaves_the_old_file_and_the_next_write_clears_up(small: Path) -> None:
    before = small.read_bytes()
    code = """
        import os, sys, torch
        from pathlib import Path
        from dynrank_fx import store
        os.replace = lambda *args: os._exit(7)
        store.write(Path(sys.argv[1]), {"w": torch.zeros(1000)}, {})
    """
    assert subprocess.run([sys.executable, "-c", dedent(code), str(small)]).returncode == 7
    assert small.read_bytes() == before
    store.write(small, {"w": torch.zeros(3)}, {})
    assert files(small.parent) == ["small"]


def test_a_kill_at_a_random_moment_leaves_a_file_that_reads(tmp_path: Path) -> None:
    code = """
        import sys, torch
        from pathlib import Path
        from dynrank_fx import store
        path, value = Path(sys.argv[1]), 0
        while True:
            store.write(path, {"w": torch.full((200_000,), float(value))}, {"value": value})
            value += 1
            print(value, flush=True)
    """
    path, draw = tmp_path / "f", random.Random(0)
    command = [sys.executable, "-c", dedent(code), str(path)]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                writer.stdout.readline()
            for _ in range(20):  # reads beside the writer, too
                tensors, info = store.read(path)
                assert bool((tensors["w"] == info["value"]).all())
            time.sleep(draw.random() / 50)
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
        tensors, info = store.read(path)
        assert bool((tensors["w"] == info["value"]).all())
        assert tensors["w"].shape == (200_000,)


def test_a_file_replaced_while_it_is_read_is_read_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        store.write(small, {"w": torch.zeros(5)}, {"value": 5})
        raise SafetensorError("half old, half new")

    monkeypatch.setattr(store, "safe_open", torn)
    tensors, info = store.read(small)
    assert (tensors["w"].shape, info) == ((5,), {"value": 5})


def test_a_disk_that_is_full_at_the_last_moment_is_a_sentence(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(lambda: store.write(small, {"w": torch.zeros(1000)}, {})) == (
        f"{small} could not be written (No space left on device); what was there before is unchanged"
    )
    assert small.read_bytes() == before
    assert files(small.parent) == ["small"]


def test_a_disk_that_takes_no_more_is_a_sentence(small: Path) -> None:
    """The kernel refuses the bytes: a limit on the size of files stands for a full disk."""
    before = small.read_bytes()
    code = """
        import resource, signal, sys, torch
        from pathlib import Path
        from dynrank_fx import store
        from dynrank_fx.errors import StoreError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            store.write(Path(sys.argv[1]), {"w": torch.zeros(100_000)}, {})
        except StoreError as error:
            print(error, end="")
    """
    done = subprocess.run([sys.executable, "-c", dedent(code), str(small)], capture_output=True, text=True)
    assert done.stdout.startswith(f"{small} could not be written (")
    assert "File too large" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert small.read_bytes() == before
    assert files(small.parent) == ["small"]


@pytest.mark.parametrize("parent", ["no/such/folder", "small"], ids=["missing", "a file"])
def test_a_place_that_cannot_be_written_is_a_sentence(small: Path, parent: str) -> None:
    path = small.parent / parent / "f"
    message = refusal(lambda: store.write(path, {"w": torch.zeros(1)}, {}))
    assert message.startswith(f"{path} could not be written (")
    assert "rror" not in message
    assert files(small.parent) == ["small"]


@pytest.mark.parametrize("reading", [store.read, lambda path: (store.read_tensors(path), INFO)], ids=["run", "tensors"])
@pytest.mark.parametrize("error", [RuntimeError("the file is smaller than the required mapping size"), ValueError("x")])
def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(
    reading: Callable[[Path], Any], error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened, old, new = tmp_path / "f", store.safe_open, torch.zeros(3), torch.ones(5)
    store.write(path, {"w": old}, INFO)
    errors = [error]

    def replaced(name: Path, framework: str) -> Any:
        if errors:
            store.write(path, {"w": new}, INFO)
            raise errors.pop()
        return opened(name, framework=framework)

    monkeypatch.setattr(store, "safe_open", replaced)
    tensors, info = reading(path)
    assert torch.equal(tensors["w"], new)
    assert info == INFO


def test_an_error_of_torch_while_a_file_stays_as_it_is_is_torchs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(tmp_path / "f", {"w": torch.zeros(3)}, INFO)

    def failing(name: Path, framework: str) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(store, "safe_open", failing)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        store.read(tmp_path / "f")
