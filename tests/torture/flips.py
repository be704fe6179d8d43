"""Flip one bit of a file that the tool wrote, or cut it short, and read it: refused, or the same result as before."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import re
import runpy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import onnx
import torch
from safetensors.torch import load_file
from torch import nn
from work import MODEL, Outcome, apart, command

import dynrank_fx as dr
from dynrank_fx.cli.weights import load_weights_
from dynrank_fx.compression import SiteTimes


@dataclass(frozen=True)
class Reader:
    """Something that reads files. files: their names. read: what it makes of the folder that they are in."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], object]


@dataclass(frozen=True)
class Flip:
    """One harm: the file, what was done to it, who read it, and what became of that.

    outcome: ``refused``, ``told`` (by a warning), ``same``, or what is wrong: ``silent`` (another result),
    ``traceback``, ``crashed``, ``late``.
    """

    file: str
    harm: str
    reader: str
    outcome: str
    said: str = ""


def _weights(file: Path) -> object:
    tensors = load_file(file)
    return {name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def _initializers(file: Path) -> object:
    return sorted(each.raw_data for each in onnx.load(file).graph.initializer)


def _export(source: str, *options: object) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        command("export", folder / source, *options, "-o", folder / "again.onnx")
        return _initializers(folder / "again.onnx")

    return read


def _resumed(folder: Path) -> object:
    command("train", MODEL, "--out", folder / "half", "--resume")
    return _weights(folder / "half" / "checkpoint.safetensors")


def _said(*arguments: object) -> Callable[[Path], object]:
    """What a command prints, times and places apart."""

    def read(folder: Path) -> object:
        os.chdir(folder)
        return re.sub(r"\d[\d.]* m?s\b", "", command(*arguments))

    return read


def _report(folder: Path) -> object:
    command("report", folder / "run", "-o", folder / "page.html")
    return re.sub(r"/\S+", "", (folder / "page.html").read_text(encoding="utf-8"))


def _model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model of the model file, and its example inputs."""
    space = runpy.run_path(str(MODEL))
    return space["model"](), space["example_inputs"]()


def _net() -> nn.Module:
    return dr.transform(*_model(), rank=dr.Fixed(2))


def _loaded(folder: Path) -> object:
    return _state(dr.load(folder / "net", *_model()))


def _state(net: nn.Module) -> object:
    tensors = {name: tensor.numpy().tobytes() for name, tensor in net.state_dict().items()}
    return tensors, json.dumps(dr.plan_of(net).to_json())


def _make_checkpoints(folder: Path) -> None:
    """What the callbacks of the trainers write, after two steps; without their trainers, which take their time."""
    from dynrank_fx.integrations.transformers import PhasesCallback

    net, (x,) = _net(), _model()[1]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    schedule = dr.schedules.interleave(low=1, full=1)
    callback = PhasesCallback(schedule)
    callback.phases = dr.Phases(net, optimizer, schedule, steps=6, every=1, landing=True)
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (folder / "trainer" / "checkpoint-2").mkdir(parents=True)
    callback.on_save(
        SimpleNamespace(output_dir=folder / "trainer", should_save=True), SimpleNamespace(global_step=2), None
    )  # type: ignore[arg-type]
    saved = {"callbacks": {"PhasesCallback": callback.phases.state_dict()}, "state_dict": net.state_dict()}
    torch.save(saved, folder / "lightning.ckpt")


def _resumed_by(trainer: str, path: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        net = _net()
        importlib.import_module(f"dynrank_fx.integrations.{trainer}").resume_from_(net, folder / path)
        return dr.phases_of(net), json.dumps(dr.plan_of(net).to_json())

    return read


def _times(folder: Path) -> object:
    """The times in a cache. One that is damaged is measured anew, which is as good as a refusal."""
    known = SiteTimes(cache=folder / "times.json")._known
    if not known:
        raise dr.StoreError("there are no times in it")
    return known


def _weighted(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        model, _ = _model()
        load_weights_(model, folder / name)
        return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}

    return read


TOLD = "is not as dynrank-fx wrote it"
RUN = ("run/checkpoint.safetensors", "run/run.json", "run/history.jsonl")
NET = ("net/weights.safetensors", "net/plan.json")
PHASES = "trainer/checkpoint-2/phases.safetensors"
BESIDE = ("large.onnx", "large.onnx.data")
READERS = (
    Reader("train --resume", ("half/checkpoint.safetensors", "half/run.json", "half/history.jsonl"), _resumed),
    Reader("inspect a run", RUN, _said("inspect", "run")),
    Reader("export a run", RUN, _export("run")),
    Reader("report", RUN, _report),
    Reader("inspect a net", NET, _said("inspect", "net", "--model", MODEL)),
    Reader("load", NET, _loaded),
    Reader("train --from", NET, _said("train", MODEL, "--from", "net", "--epochs", 1, "--no-compile", "--out", "new")),
    Reader("--weights of torch", ("weights.pt",), _weighted("weights.pt")),
    Reader("--weights of transform", ("dense/weights.safetensors",), _weighted("dense/weights.safetensors")),
    Reader("cache of times", ("times.json",), _times),
    Reader("Hugging Face", (PHASES,), _resumed_by("transformers", "trainer/checkpoint-2")),
    Reader("Lightning", ("lightning.ckpt",), _resumed_by("lightning", "lightning.ckpt")),
    Reader("export a .pt", ("small.pt",), _export("small.pt", "--model", MODEL)),
    Reader("verify", ("small.onnx",), _said("verify", "small.onnx", "small.pt", "--model", MODEL)),
    Reader("inspect a file", ("small.onnx",), _said("inspect", "small.onnx")),
    Reader("verify with .data", BESIDE, _said("verify", "large.onnx", MODEL)),
    Reader("inspect with .data", BESIDE, _said("inspect", "large.onnx")),
)


def make(folder: Path, light: bool) -> None:
    """One of every file. light: but for those of ONNX."""
    train = ("train", MODEL, "--rank", 0.25, "--schedule", "interleave", "--no-compile")
    command(*train, "--out", folder / "run")
    os.environ["STOP_AT"] = "7"
    with contextlib.suppress(click.ClickException):  # stopped in the third epoch
        command(*train, "--checkpoint-steps", 2, "--out", folder / "half")
    del os.environ["STOP_AT"]
    command("transform", MODEL, "--rank", 0.25, "--out", folder / "net")
    command("transform", MODEL, "--out", folder / "dense")
    torch.save(_model()[0].state_dict(), folder / "weights.pt")
    times = SiteTimes(cache=folder / "times.json", repeats=1)
    times.pair(dr.plan_of(_net()).sites[:1], 2)
    times.save()
    with contextlib.suppress(ImportError):  # where the trainers are not installed
        _make_checkpoints(folder)
    for name in ("small.pt",) if light else ("small.onnx", "small.pt"):
        command("compress", MODEL, "--budget", "params=0.6", "--no-timing", "-o", folder / name)
    if not light:
        command("export", MODEL, "--external-data", "-o", folder / "large.onnx")


def harmed(file: Path, harm: str) -> None:
    """Harm a file in its place: ``bit 17``, ``cut at 17`` (a byte), or ``zeros from 17`` on."""
    data, place = bytearray(file.read_bytes()), int(harm.split()[-1])
    if harm.startswith("bit"):
        data[place // 8] ^= 1 << place % 8
    elif harm.startswith("cut"):
        del data[place:]
    else:
        data[place:] = bytes(len(data) - place)
    file.write_bytes(data)


def _harm(chance: random.Random, size: int) -> str:
    """Mostly a bit; one in eight is cut short or zeroed, half of these from the start."""
    place = chance.choice([0, chance.randrange(size)])
    return chance.choice([f"bit {chance.randrange(8 * size)}"] * 14 + [f"cut at {place}", f"zeros from {place}"])


def flip(original: Path, reader: Reader, file: str, harm: str, should: object) -> Flip:
    """Read a copy of a folder in which one file is harmed."""
    with tempfile.TemporaryDirectory(prefix="torture") as place:
        folder = Path(place, "copy")
        shutil.copytree(original, folder)
        harmed(folder / file, harm)
        outcome = apart(lambda: reader.read(folder), 60)
    return Flip(file, harm, reader.name, _kind(outcome, should), outcome.said)


def _kind(outcome: Outcome, should: object) -> str:
    if outcome.kind == "done":
        if TOLD in str(outcome.value):
            return "told"
        return "same" if outcome.value == should else "silent"
    return outcome.kind


Once = Callable[[str, type[Flip], Callable[[], Flip]], Flip]
"""Does a piece of work under its name, or knows what came of it."""


def campaign(count: int, seed: int, once: Once, light: bool = False) -> list[Flip]:
    """So many flips, spread over all files and readers. light: without files of ONNX, and without what exports."""
    chance, flips = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="torture") as place:
        original = Path(place, "files")
        original.mkdir()
        made = apart(lambda: make(original, light), 300)
        assert made.kind == "done", made.said
        readers = [reader for reader in READERS if not (light and reader.name.startswith("export"))]
        pairs = [(reader, file) for reader in readers for file in reader.files if (original / file).exists()]
        chance.shuffle(pairs)

        @functools.cache
        def should(reader: Reader) -> object:
            with tempfile.TemporaryDirectory(prefix="torture") as own:
                shutil.copytree(original, Path(own, "copy"))
                outcome = apart(lambda: reader.read(Path(own, "copy")), 60)
            assert outcome.kind == "done", f"{reader.name}: {outcome.said}"
            return outcome.value

        for i in range(count):
            reader, file = pairs[i % len(pairs)]
            harm = _harm(chance, (original / file).stat().st_size)
            name = f"flip {i}: {reader.name}, {file}"
            flips.append(once(name, Flip, lambda: flip(original, reader, file, harm, should(reader))))  # noqa: B023
    return flips
