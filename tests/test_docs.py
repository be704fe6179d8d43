"""The documents execute: every Python block and every dynrank-fx command of the pages, in the order of the page.

A block is left out only where a comment before it says why: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_rooms import FLOORS

import dynrank_fx as dr
from dynrank_fx.cli.main import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")} | PAGES
EVERYTHING = "\n".join(TEXTS.values())
SCHEDULES = [name for name in dr.schedules.__all__ if inspect.isfunction(getattr(dr.schedules, name))]

# Pages that begin with the files which the commands of another have left; a command run there is not run again.
CONTINUES = dict.fromkeys(("README.md", "compress.md", "export-and-deploy.md"), "getting-started.md")

# What keeps the sample that the pages train small: one block in place of three, and fewer images.
SMALLER = {
    "Block(width, width), Block(width, 2 * width, stride=2), Block(2 * width, 2 * width)": (
        "Block(width, 2 * width, stride=2)"
    ),
    "TensorDataset(images[train], labels[train])": "TensorDataset(images[train[:256]], labels[train[:256]])",
}

# What keeps the commands of the pages small; of an option that is given twice the later counts.
SMALL = {
    "train": ["--epochs", "2", "--no-compile"],
    "compress": ["--calibrate", "2"],
    "bench": ["--repeats", "5"],
}


def small(words: list[str]) -> list[str]:
    """A command with what keeps it small. Layers are timed only where the budget needs it."""
    more = SMALL.get(words[0], [])
    if "--steps" in words:
        more = ["--steps", "20" if words[0] == "pilot" else "2", "--no-compile"]
    if "--recover-steps" in words:
        more = [*more, "--recover-steps", "3"]
    if words[0] == "compress" and not any(word.startswith("latency") for word in words):
        more = [*more, "--no-timing"]
    # How much time a small sample can save is a matter of the machine.
    words = ["latency=0.95" if word.startswith("latency=") else word for word in words]
    if any(word.startswith("max_drop") for word in words):
        more = [*more, "--multiple-of", "32"]
    return [*words, *more]


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line of content in the page."""

    language: str
    code: str
    line: int
    not_run: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command in a block of sh."""
        lines = self.code.splitlines() if self.language == "sh" else []
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(text: str) -> list[Block]:
    fence = re.compile(r"(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["why"] or "")
        for found in fence.finditer(text)
    ]


BLOCKS = {name: blocks(text) for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def left_by(tmp_path_factory: pytest.TempPathFactory):
    """The folder that a page's commands leave, for pages that continue it; made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("page")
            with pytest.MonkeyPatch.context() as patch:
                run_page(name, made[name], patch, folder)
        return made[name]

    return folder


def run_page(name: str, folder: Path, patch: pytest.MonkeyPatch, left_by) -> None:
    """The blocks of a page in their order: Python in one namespace, commands in one folder."""
    before = CONTINUES.get(name)
    if before:
        shutil.copytree(left_by(before), folder, dirs_exist_ok=True)
    else:
        put_samples(folder)
    done = [words for block in BLOCKS[before] for words in block.commands] if before else []
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    names = {"__name__": "__main__"}
    for block in BLOCKS[name]:
        if block.language == "python" and not block.not_run:
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), names)
        for program, *words in block.commands:
            if program == "dynrank-fx" and [program, *words] not in done:
                result = CliRunner().invoke(cli, small(words))
                assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"


def put_samples(folder: Path) -> None:
    """The samples beside a page's commands, with a smaller digits.py."""
    shutil.copytree(ROOT / "samples", folder / "samples", ignore=shutil.ignore_patterns("__pycache__"))
    digits = folder / "samples/digits.py"
    text = digits.read_text(encoding="utf-8")
    for whole, less in SMALLER.items():
        assert text.count(whole) == 1, whole
        text = text.replace(whole, less)
    digits.write_text(text, encoding="utf-8")


def runs(block: Block) -> bool:
    return block.language == "python" or any(words[0] == "dynrank-fx" for words in block.commands)


@pytest.mark.parametrize("name", [name for name in TEXTS if any(map(runs, BLOCKS[name]))])
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch, left_by):
    if name == "getting-started.md":
        folder = left_by(name)  # others continue it: run it once
    else:
        folder = tmp_path
        run_page(name, folder, monkeypatch, left_by)
    written = {
        "README.md": ("small.onnx", "digits.onnx", "ranks.png", "digits-run/report.html"),
        "getting-started.md": ("small.onnx", "digits.onnx", "ranks.png", "net-folder/plan.json"),
        "train-with-phases.md": ("auto-run/run.json", "low-run/run.json"),
        "compress.md": ("small.onnx", "smaller.onnx", "faster.onnx", "small.pt"),
        "export-and-deploy.md": ("deployed.onnx", "int8.onnx", "small.onnx"),
    }
    assert [file for file in written.get(name, ()) if not (folder / file).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_code_is_narrow_enough_to_be_read_without_scrolling(name):
    wide = [line for block in BLOCKS[name] for line in block.code.splitlines() if len(line) > 92]
    assert wide == []


def test_what_is_not_run_is_still_python_and_little():
    left_out = {f"{name}:{block.line}": block for name in TEXTS for block in BLOCKS[name] if block.not_run}
    assert len(left_out) <= 7
    for block in left_out.values():
        ast.parse(block.code)


def check_what_torchrun_starts(words: list[str]) -> None:
    """A script that is there, or one of the commands with options that it has."""
    scripts = [word for word in words if word.endswith(".py")]
    if "dynrank_fx.cli" not in words:
        assert all((ROOT / script).exists() for script in scripts)
        return
    command, *rest = words[words.index("dynrank_fx.cli") + 1 :]
    known = {option for parameter in cli.commands[command].params for option in parameter.opts}
    assert {word for word in rest if word.startswith("-")} <= known


@pytest.mark.parametrize("name", TEXTS)
def test_other_commands_of_a_page_name_what_is_there(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in BLOCKS[name]:
        assert block.language in ("python", "sh", "text"), f"{name}:{block.line}"
        for program, *words in block.commands:
            assert program in ("dynrank-fx", "make", "pip", "torchrun"), f"{name}:{block.line}: {program}"
            if program == "torchrun":
                check_what_torchrun_starts(words)
            assert program != "make" or re.search(rf"^{words[0]}:", makefile, re.M), words
    for script in re.findall(
        r"`(?:python )?((?:samples|benchmarks|tests|dynrank_fx|cli)/[\w/.-]+)(?![\w/.:-])", TEXTS[name]
    ):
        assert (ROOT / script).exists(), f"{name}: {script}"


@pytest.mark.parametrize("name", TEXTS)
def test_the_benchmarks_that_a_page_names_are_there(name):
    known = re.findall(r'Benchmark\(\s*"([\w-]+)"', (ROOT / "benchmarks/run.py").read_text(encoding="utf-8"))
    assert len(known) > 10
    for names in re.findall(r"benchmarks/run\.py((?: [a-z][\w-]*)+)", TEXTS[name]):
        assert set(names.split()) <= set(known)


# What has to be told


def test_the_readme_is_short_and_names_the_paper():
    assert len(TEXTS["README.md"].splitlines()) <= 170
    assert "2508.08625" in TEXTS["README.md"]


@pytest.mark.parametrize("command", cli.commands)
def test_a_command_is_shown_at_work_and_on_its_own_page(command):
    shown = [words for name in TEXTS for block in BLOCKS[name] for words in block.commands]
    assert ["dynrank-fx", command] in [words[:2] for words in shown]
    assert PAGES["commands.md"].count(f"\n::: help {command}\n") == 1  # where the site has the help of every option


@pytest.mark.parametrize("command", cli.commands)
def test_every_option_of_a_command_has_its_help(command):
    for parameter in cli.commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{command} {parameter.opts}"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_explained(name):
    assert f"`{name}(" in PAGES["train-with-phases.md"]


def test_the_schedules_of_the_command_line_are_listed():
    (listed,) = re.findall(r"^`--schedule` takes (.+?)\. ", PAGES["train-with-phases.md"], re.M)
    assert re.findall(r"`([\w-]+)`", listed) == [named.name for named in dr.schedules.BY_NAME]


def test_every_public_name_is_in_the_reference_once():
    named = re.findall(r"^::: dynrank_fx\.(\S+)$", PAGES["api.md"], re.M)
    expected = [name for name in dr.__all__ if name not in ("__version__", "schedules")]
    assert sorted(named) == sorted([*expected, *(f"schedules.{name}" for name in SCHEDULES)])
    assert "`dr.__version__`" in PAGES["api.md"]
    assert "`dr.schedules`" in PAGES["api.md"]


def test_the_page_of_the_architecture_has_the_floors_of_the_test():
    rows = re.findall(r"^\| (\d) \| (.+?) \| .+ \|$", PAGES["architecture.md"], re.M)
    assert [int(floor) for floor, _ in rows] == list(range(len(FLOORS)))
    assert [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == [tuple(sorted(rooms)) for rooms in FLOORS]


def test_every_page_is_in_the_navigation_and_links_are_true_in_the_repository():
    navigation = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert set(PAGES) <= set(navigation)
    for name, text in TEXTS.items():
        home = DOCS if name in PAGES else ROOT
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target and (path := target.partition("#")[0]):
                assert (home / path).exists(), f"{name}: {target}"


def test_the_site_is_built_so_that_warnings_fail():
    """mkdocs counts only the warnings that it shows: with --quiet a strict build passes over all of them."""
    (recipe,) = re.findall(r"^\t(.*mkdocs build.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe.endswith("mkdocs build --strict")
