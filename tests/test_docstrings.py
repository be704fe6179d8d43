"""Every public name says what it takes, what it gives and what it raises, in the form that the API pages are made from.

The truth is in the signatures, as ``inspect`` reads them.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import inspect
import re
from collections.abc import Callable, Iterator

import pytest
import schemas  # noqa: F401 (torchvision, which the trainers import, asks for its ops on a torch that has none)

import dynrank_fx
from dynrank_fx import errors, schedules

PUBLIC = {name: getattr(dynrank_fx, name) for name in dynrank_fx.__all__}
PUBLIC |= {f"schedules.{name}": getattr(schedules, name) for name in schedules.__all__}
DOCUMENTED = [name for name, value in PUBLIC.items() if inspect.isclass(value) or inspect.isfunction(value)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_name_is_documented(name: str) -> None:
    assert list(faults(name, PUBLIC[name])) == []


@pytest.mark.filterwarnings("ignore")  # of the trainers about themselves
@pytest.mark.parametrize("name", ["callback", "lightning", "tensorboard", "transformers"])
def test_the_integrations_are_documented(name: str) -> None:
    home = f"dynrank_fx.integrations.{name}"
    module = pytest.importorskip(home, exc_type=ImportError)
    mine = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == home}
    assert mine
    assert [fault for name, value in mine.items() if name[0] != "_" for fault in faults(name, value)] == []


def test_a_fault_is_seen() -> None:
    def good(shape: int) -> int:
        """A sentence.

        Args:
            shape: What it is.

        Returns:
            Something.

        Raises:
            PlanError: Never.
        """
        return shape

    def bad(shape: int) -> int:  # noqa: D417
        """A sentence that goes on
        and on. Raises PlanError.

        Args:
            size: What it is not.

        Raises:
            PlanningError: For what there is not.
        """
        return shape

    assert list(faults("good", good)) == []
    assert len(list(faults("bad", bad))) == 5


# What is wrong with a docstring


def faults(name: str, value: object) -> Iterator[str]:
    """What is wrong with the docstrings of a class with its members, or of a function; a sentence each."""
    if inspect.isfunction(value):
        yield from _of_a_function(name, value)
    elif inspect.isclass(value):
        yield from _of_a_class(name, value)
        for member, each in inspect.getmembers(value):
            if member.startswith("_") or not _is_ours(each):
                continue
            if inspect.isroutine(each):
                yield from _of_a_function(f"{name}.{member}", each)
            elif isinstance(each, property):
                yield from _of_any(f"{name}.{member}", each)


def _is_ours(member: object) -> bool:
    function = member.fget if isinstance(member, property) else member
    return str(getattr(function, "__module__", None)).startswith("dynrank_fx.")


def _of_any(name: str, value: object) -> Iterator[str]:
    doc = inspect.getdoc(value)
    if not doc:
        yield f"{name} has no docstring"
        return
    first, *rest = doc.split("\n")
    if not first.endswith((".", ":")) or (rest and rest[0]):
        yield f"{name} does not begin with a sentence in one line: {first}"
    if re.search(r"[Rr]aises \w+Error\b|\bReturns \w", doc):
        yield f"{name} says in prose what belongs into a section"
    for section, kind in (("Raises", Exception), ("Warns", Warning)):
        for each in _items(doc, section):
            found = getattr(errors, each, getattr(builtins, each, None))
            if not (isinstance(found, type) and issubclass(found, kind)):
                yield f"{name} names {each} under {section}, which there is not"


def _of_a_function(name: str, function: Callable[..., object]) -> Iterator[str]:
    yield from _of_any(name, function)
    doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
    if _items(doc, "Args") != _parameters(signature):
        yield f"{name} takes {_parameters(signature)} and names {_items(doc, 'Args')} under Args"
    returns = signature.return_annotation not in (None, "None")
    if ("\nReturns:\n    " in doc) != returns:
        yield f"{name} returns {signature.return_annotation}, and Returns is {'missing' if returns else 'superfluous'}"


def _of_a_class(name: str, kind: type) -> Iterator[str]:
    yield from _of_any(name, kind)
    doc = inspect.getdoc(kind) or ""
    if issubclass(kind, enum.Enum):
        section, wanted = "Attributes", list(kind.__members__)
    elif dataclasses.is_dataclass(kind):
        fields = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
        section, wanted = "Attributes", fields
    elif "__init__" in vars(kind):
        section, wanted = "Args", _parameters(inspect.signature(kind))
    else:
        return
    if _items(doc, section) != wanted:
        yield f"{name} has {wanted} and names {_items(doc, section)} under {section}"


def _parameters(signature: inspect.Signature) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [f"{stars.get(p.kind, '')}{p.name}" for p in signature.parameters.values() if p.name not in ("self", "cls")]


def _items(doc: str, section: str) -> list[str]:
    """The names of a section's items: ``name: text``, four blanks in."""
    text = doc.partition(f"\n{section}:\n")[2].partition("\n\n")[0]
    return re.findall(r"^    (\*{0,2}\w+): \S", text, flags=re.MULTILINE)
