"""The architecture of the package: which rooms there are, and which may import which. FLOORS says what ought to be."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dynrank_fx"

# A file imports only from floors below its own room's, or from its own room. docs/architecture.md shows the same table.
FLOORS = (
    ("ground", "ops"),
    ("layouts", "processes", "schedules", "tracing"),
    ("plan",),
    ("rewrite",),
    ("onnx", "phases", "report"),
    ("compression", "training"),
    ("integrations",),
    ("cli",),
)
GROUND = (
    "aliases",
    "checks",
    "errors",
    "files",
    "phase",
    "randomness",
    "seals",
    "store",
    "text",
    "times_file",
    "timing",
    "version",
)  # files, not rooms
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Stricter than the floors: what a place may not import although it lies below.
NEVER = {
    "schedules": {"torch"},
    "training": {
        "onnx",
        "onnxruntime",
        "dynrank_fx.onnx",
        "dynrank_fx.compression.to_budget",
        "dynrank_fx.compression.search",
    },
    "plan/site.py": {"torch.fx"},
    "plan/plan.py": {"torch.fx"},
    "plan/ranks.py": {"torch.fx"},
    "plan/budget.py": {"torch.fx"},
    "plan/overrides.py": {"torch.fx"},
}
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
FILES |= {f"cli/{path.name}": path for path in (ROOT / "cli").glob("*.py")}


def room_of(file: str) -> str:
    """The room of a file; the ground's files stand in one."""
    place = file.split("/")[0].removesuffix(".py")
    return "ground" if place in GROUND else place


def imports(file: str) -> set[tuple[str, str]]:
    """(module, name) of every import in a file, absolute: those in functions and for type checking too."""
    here = ["dynrank_fx", *file.split("/")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {(module, alias.name) for alias in node.names}
    return found


def ours(file: str) -> set[tuple[str, str]]:
    """What a file imports from other rooms: (room, what follows the room in the path, or the name)."""
    found = set()
    for module, name in imports(file):
        parts = module.split(".")
        if parts[0] == "dynrank_fx":
            room, *rest = [*parts[1:], *([name] if name else [])]
            room = "ground" if room in GROUND else room
            if room != room_of(file):
                found.add((room, ".".join(rest)))
    return found


def public(room: str) -> set[str]:
    """``__all__`` of a room."""
    (names,) = [
        node.value
        for node in ast.parse(FILES[f"{room}/__init__.py"].read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return set(ast.literal_eval(names))


# Rooms with one door; each integration asks for a package of its own, and the commands are imported by nobody.
ROOMS = [room for room in FLOOR if room not in ("ground", "integrations", "cli")]


def test_every_file_is_in_a_room_or_on_the_ground() -> None:
    assert {room_of(file) for file in FILES} - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize("file", sorted(FILES.keys() - {"__init__.py"}))
def test_a_file_imports_only_from_lower_floors(file: str) -> None:
    assert {(room, name) for room, name in ours(file) if FLOOR[room] >= FLOOR[room_of(file)]} == set()


@pytest.mark.parametrize("file", sorted(FILES))
def test_rooms_are_entered_by_their_doors(file: str) -> None:
    """Across rooms only the names in ``__all__`` are imported, or the room itself."""
    assert {(room, name) for room, name in ours(file) if room in ROOMS and name and name not in public(room)} == set()


@pytest.mark.parametrize("place", NEVER)
def test_what_a_place_never_imports(place: str) -> None:
    files = [file for file in FILES if file == place or file.startswith(f"{place}/")]
    assert files
    modules = {f"{module}.{name}" for file in files for module, name in imports(file)}
    assert not {m for m in modules for never in NEVER[place] if m == never or m.startswith(f"{never}.")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_one_sentence_what_it_is_for_and_what_it_gives(room: str) -> None:
    tree = ast.parse(FILES[f"{room}/__init__.py"].read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    assert re.fullmatch(r"[^.]+\.", text.replace("\n", " ")), text
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert public(room) == {alias.asname or alias.name for node in imported for alias in node.names}


@pytest.mark.parametrize("file", sorted(FILES))
def test_any_stands_with_its_reason(file: str) -> None:
    """After ``# Any:`` on its line or the one above, or in the docstring of an alias."""
    text = FILES[file].read_text(encoding="utf-8")
    lines, tree = ["", *text.splitlines()], ast.parse(text)
    aliases = [
        range(alias.lineno, docstring.lineno)
        for alias, docstring in pairwise(tree.body)
        if isinstance(alias, ast.AnnAssign) and ast.unparse(alias.annotation) == "TypeAlias"
        if isinstance(docstring, ast.Expr)
    ]
    numbers = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "Any"]
    bare = {n for n in numbers if not any(n in alias for alias in aliases)}
    assert not {lines[n] for n in bare if "# Any: " not in lines[n - 1] + lines[n]}


@pytest.mark.parametrize("room", FLOOR)
def test_no_circle_between_the_files_of_a_room(room: str) -> None:
    inside = [file for file in FILES if room_of(file) == room and not file.endswith("__init__.py")]
    files = {f"dynrank_fx.{file.removesuffix('.py').replace('/', '.')}": file for file in inside}
    needs = {
        module: {each for source, name in imports(file) for each in (source, f"{source}.{name}") if each in files}
        for module, file in files.items()
    }
    while needs:
        ready = {module for module, others in needs.items() if not others & needs.keys()}
        assert ready, f"a circle among {sorted(needs)}"
        needs = {module: others for module, others in needs.items() if module not in ready}


UNTESTED: frozenset[str] = frozenset()  # none; a reason would stand beside each


def test_every_file_of_a_room_has_a_test_file_of_its_own_name() -> None:
    files = {path.relative_to(PACKAGE) for path in PACKAGE.glob("*/*.py") if path.name != "__init__.py"}
    tests = ROOT / "tests"
    without = {str(file) for file in files if not (tests / file.parent / f"test_{file.name}").is_file()}
    assert without == UNTESTED
