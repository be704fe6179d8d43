"""The samples that read CIFAR: on small files in the published binary format, and the paper's networks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import dynrank_fx as dr
from dynrank_fx.cli.modelfile import load_model_file
from dynrank_fx.plan import Role
from dynrank_fx.training import paper_cifar10

SAMPLES = Path(__file__).parents[1] / "samples"
LEFT = (Role.SHORTCUT, Role.HEAD)


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SAMPLES))
    import cifar

    return cifar


def record(labels: list[int], seed: int) -> bytes:
    pixels = torch.randint(256, (3072,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return bytes(labels) + bytes(pixels.tolist())


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five files of 30 records, and 20 to test."""
    for i in range(1, 6):
        rows = [record([(i + j) % 10], 100 * i + j) for j in range(30)]
        (tmp_path / f"data_batch_{i}.bin").write_bytes(b"".join(rows))
    (tmp_path / "test_batch.bin").write_bytes(b"".join(record([j % 10], j) for j in range(20)))
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    return tmp_path


def test_images_and_labels_are_those_of_the_file(cifar, cifar10):
    images, labels = cifar.read("CIFAR10", cifar10, train=True)
    assert images.shape == (150, 3, 32, 32)
    assert labels.tolist()[:3] == [1, 2, 3]
    raw = (cifar10 / "data_batch_2.bin").read_bytes()
    assert labels[30] == raw[0]
    second = raw[3073:]
    assert images[31, 1, 4, 7] == second[1 + 1024 + 4 * 32 + 7], "green, row 4, column 7"
    assert cifar.read("CIFAR10", cifar10, train=False)[0].shape == (20, 3, 32, 32)


def test_cifar100_has_two_labels_and_the_fine_one_counts(cifar, tmp_path):
    (tmp_path / "train.bin").write_bytes(record([3, 97], 0) + record([1, 5], 1))
    images, labels = cifar.read("CIFAR100", tmp_path, train=True)
    assert labels.tolist() == [97, 5]
    assert bytes(images[1].flatten().tolist()) == record([1, 5], 1)[2:]


def test_training_images_are_shifted_and_mirrored_and_test_images_are_not(cifar, cifar10):
    images, labels = cifar.read("CIFAR10", cifar10, train=False)
    plain = list(cifar.Batches(images, labels, 8, augment=False))
    assert [len(y) for _, y in plain] == [8, 8, 4]
    scale = cifar.Batches(images, labels, 8, augment=False)
    torch.testing.assert_close(plain[0][0] * scale.std + scale.mean, images[:8].float() / 255)
    torch.manual_seed(0)
    augmented = cifar.Batches(images, labels, 10, augment=True)
    x, y = next(iter(augmented))
    assert len(augmented) == 2
    assert len(set(y.tolist())) > 3
    found = 0
    for image, label in zip(x, y, strict=True):
        for original in images[labels == label].float() / 255:
            padded = torch.nn.functional.pad((original - scale.mean[0]) / scale.std[0], (4, 4, 4, 4))
            views = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
            for way in (image, image.flip(-1)):
                found += bool((views - way).abs().amax((1, 2, 3)).min() < 1e-5)
    assert found == 10, "every one is a shift of its own image, mirrored or not"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "data_batch_3.bin").unlink(), r"data_batch_3\.bin is missing: give the folder"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(b"123"), r"is cut off: its records have 3073 bytes"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(record([77], 0)), r"holds a label of 77"),
    ],
)
def test_files_that_are_none_are_told(cifar, cifar10, spoil, words):
    spoil(cifar10)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        cifar.read("CIFAR10", cifar10, train=True)


def test_without_the_folder_the_command_says_what_to_set(monkeypatch):
    monkeypatch.delenv("CIFAR10", raising=False)
    with pytest.raises(dr.ModelFileError, match="set the environment variable CIFAR10 to the folder"):
        load_model_file(SAMPLES / "resnet20.py").train_data()


def test_resnet20_is_the_papers():
    """Every 3×3 convolution in sites, the stem too, at half the rank; shortcuts and classifier dense."""
    file = load_model_file(SAMPLES / "resnet20.py")
    net = dr.transform(file.model(), file.example_inputs(), rank=paper_cifar10().rank, leave=LEFT)
    plan = dr.plan_of(net)
    assert sum(p.numel() for p in file.model().parameters()) == 272_474, "0.27 M, as in arXiv 1512.03385"
    assert len(plan.sites) == 19
    assert all(row.site.shape[2:] == (3, 3) and row.rank == row.site.shape[0] // 2 for row in plan.sites)
    assert {s.shape[2:] for s in plan.skipped} == {(1, 1), ()}


def test_wrn_28_10_is_the_papers():
    file = load_model_file(SAMPLES / "wrn28.py")
    with torch.device("meta"):
        model = file.model()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 36.5, "as in arXiv 1605.07146"


def test_the_papers_training_runs_through_all_three_phases(cifar10):
    """On 150 random images: a shortened schedule, the rest as it is."""
    from dynrank_fx.training import Run, Settings, Task, fit

    file, preset = load_model_file(SAMPLES / "resnet20.py"), paper_cifar10()
    torch.manual_seed(0)
    net = dr.transform(file.model(), file.example_inputs(), rank=preset.rank, leave=LEFT)
    optimizer = file.optimizer(net.parameters())
    schedule = dr.schedules.FullBetween(1, 2, dr.Phase.ADAPTOR)
    task = Task(file.train_data(), file.loss, file.inputs, file.eval_data(), file.metric)
    run = Run(net, optimizer, schedule, file.lr_scheduler(optimizer)[0])
    settings = Settings(epochs=3, compile=False, carry=preset.carry, random_init=preset.random_init)
    assert fit(run, task, settings)
    assert [record.phase for record in run.history] == ["LOW", "FULL", "ADAPTOR"]
    costs = [record.spent for record in run.history]
    assert costs[0] < 0.65
    assert 1.15 < costs[2] - costs[1] < 1.25, "an ADAPTOR costs more than a dense step"
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))
