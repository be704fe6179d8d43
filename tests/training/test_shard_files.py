"""Files to which every process writes its part: each is as it was written, or refused."""

from __future__ import annotations

from pathlib import Path

from checkpointing import Training, broken, refusal, unequal


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
