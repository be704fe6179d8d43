"""Files to which every process writes its part: each is as it was written, or refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from checkpointing import Training, broken, refusal, unequal
from torch.distributed import checkpoint

from dynrank_fx.processes import ALONE
from dynrank_fx.training.shard_files import read_shards_


def test_every_file_is_of_this_checkpoint_and_as_it_was_written(tmp_path: Path) -> None:
    training = Training()
    for name in ("one", "other"):
        training.train(range(2))
        training.save(tmp_path / name)
    before = training.state()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [".metadata", "__0_0.distcp", "dynrank.safetensors"]
    for name in names:
        file = tmp_path / "one" / name
        data = file.read_bytes()
        broken(file)
        assert "damaged" in refusal(lambda: training.load(tmp_path / "one"))
        file.write_bytes((tmp_path / "other" / name).read_bytes())
        assert "of another checkpoint" in refusal(lambda: training.load(tmp_path / "one"))
        file.unlink()
        said = refusal(lambda: training.load(tmp_path / "one"))
        assert f"{name} is missing" in said or "has no dynrank.safetensors" in said
        file.write_bytes(data)
    assert unequal(training.state(), before) == []
    training.load(tmp_path / "one")


class Runs:
    """What runs code where it is read as pickles are."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return print, ("it ran",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_tools_read_the_tensors_and_nothing_in_a_file_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training()
    training.train(range(2))
    training.save(tmp_path / "saved")
    bias = training.net.get_parameter("last.bias")
    found = {"net.last.bias": torch.zeros(8), "optimizer.0.exp_avg.last.bias": torch.zeros(8)}
    checkpoint.load(found, checkpoint_id=tmp_path / "saved")
    assert torch.equal(found["net.last.bias"], bias)
    assert torch.equal(found["optimizer.0.exp_avg.last.bias"], training.optimizer.state[bias]["exp_avg"])
    (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Runs()))
    said = refusal(lambda: read_shards_(tmp_path / "saved", {"net.last.bias": torch.zeros(8)}, ALONE))
    assert "print, which is none of torch's descriptions of tensors" in said
    assert capsys.readouterr().out == ""
