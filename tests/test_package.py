"""What is installed: a wheel with the command and the types, documented names, and imports that cost nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dynrank_fx as dr

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "Budget",
    "CPLayout",
    "Calibration",
    "CalibrationError",
    "Capture",
    "CaptureError",
    "Carry",
    "ChannelLayout",
    "Compressed",
    "CostBy",
    "Decay",
    "DynrankError",
    "DynrankWarning",
    "Energy",
    "ExportError",
    "ExportReport",
    "Fixed",
    "Form",
    "InputLayout",
    "MaxDrop",
    "ModelFileError",
    "Override",
    "Phase",
    "Phases",
    "Plan",
    "PlanError",
    "PlanOptions",
    "Ratio",
    "Role",
    "ScheduleError",
    "SiteTimes",
    "SpatialLayout",
    "StableRank",
    "StepTimes",
    "Steps",
    "StoreError",
    "TrainState",
    "Transition",
    "TransitionError",
    "TuckerLayout",
    "__version__",
    "calibrate",
    "capture",
    "compress",
    "effective_rank",
    "enter_",
    "export_onnx",
    "factor_decay_",
    "factor_steps_",
    "factorize",
    "inline",
    "load",
    "load_checkpoint_",
    "make_plan",
    "phases_of",
    "plan_of",
    "randomize_",
    "rank_parallel_plan",
    "recalibrate_",
    "recover_",
    "replan_",
    "reranked",
    "resume_phases_",
    "rewarm_",
    "save",
    "save_checkpoint",
    "schedules",
    "stable_rank",
    "train_state",
    "transform",
    "truncate",
    "verify_onnx",
]


def python(*args: str, cwd: Path | None = None, path: Path | None = None) -> str:
    """The output of a process of its own, away from this tree."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home())} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Names


def test_the_public_names() -> None:
    assert sorted(dr.__all__) == PUBLIC == dir(dr)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(dr, name)
    assert value is getattr(dr, name)
    text = value.__doc__  # its own: not inherited, and not the signature that a dataclass gets
    assert text
    assert not text.startswith(f"{name}(")


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"^module 'dynrank_fx' has no attribute 'nothing'$"):
        dr.nothing  # noqa: B018
    assert not hasattr(dr, "numpy")


def test_a_submodule_of_the_same_name_does_not_hide_a_function() -> None:
    code = "import dynrank_fx.tracing, dynrank_fx as dr; print(dr.capture.__module__, callable(dr.load))"
    assert python("-c", code).split() == ["dynrank_fx.tracing.choose", "True"]


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dr.__version__ == project["version"]


# Imports


HEAVY = "print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'matplotlib', 'safetensors'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import dynrank_fx; dir(dynrank_fx); dynrank_fx.__version__",
        "from dynrank_fx import Phase, TrainState, schedules; schedules.aligned(10, [5])(TrainState(3))",
        "from dynrank_fx.errors import DynrankError",
        "from dynrank_fx.cli.main import cli; cli(['--help'], standalone_mode=False)",
        "from dynrank_fx.cli.main import cli; cli(['train', '--help'], standalone_mode=False)",
    ],
    ids=["package", "schedules", "errors", "help", "help of train"],
)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    assert python("-c", f"import sys; {code}; {HEAVY}").splitlines()[-1] == "[]"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("dynrank_fx", "cli", "tests", "samples"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree))
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_package_and_the_command_and_no_other_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "dynrank-fx = dynrank_fx.cli.main:main" in archive.read(points).decode()
    assert {name.split("/")[0] for name in names} == {"dynrank_fx", f"dynrank_fx-{dr.__version__}.dist-info"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "dynrank_fx").rglob("*.py")} | {
        "dynrank_fx/__init__.pyi",
        "dynrank_fx/py.typed",
    }
    expected |= {f"dynrank_fx/cli/{path.name}" for path in (ROOT / "cli").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_wheel_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target), str(wheel))
    where = "import dynrank_fx, dynrank_fx.cli; print(dynrank_fx.__file__, dynrank_fx.cli.__file__)"
    assert python("-c", where, cwd=tmp_path, path=target).split() == [
        str(target / "dynrank_fx" / "__init__.py"),
        str(target / "dynrank_fx" / "cli" / "__init__.py"),
    ]
    for entry in (["-c", "from dynrank_fx.cli.main import main; main()"], [str(target / "bin" / "dynrank-fx")]):
        help_text = python(*entry, "--help", cwd=tmp_path, path=target)
        assert help_text.startswith("Usage: dynrank-fx [OPTIONS] COMMAND [ARGS]...")
    (tmp_path / "model.py").write_text(
        "import torch\ndef model(): return torch.nn.Linear(9, 9)\ndef example_inputs(): return (torch.zeros(2, 9),)\n"
    )
    table = python(str(target / "bin" / "dynrank-fx"), "transform", "model.py", "--dry-run", cwd=tmp_path, path=target)
    assert "9x9" in table
