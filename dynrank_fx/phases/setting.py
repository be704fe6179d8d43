"""What a setting says of each site: one phase for all, or phases by name and pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from ..errors import TransitionError
from ..phase import Phase
from ..plan import fits
from ..schedules import Decision, Setting


def phases_in(setting: Setting, names: Iterable[str]) -> dict[str, Phase]:
    """The phase of every site that the setting names; later patterns win.

    Raises TransitionError for what is no phase, and for a pattern that matches no site.
    """
    names, asked = list(names), setting.phases if isinstance(setting, Decision) else setting
    if not isinstance(asked, Mapping):
        return dict.fromkeys(names, _phase(asked))
    phases, known = dict[str, Phase](), set(names)
    for pattern, phase in asked.items():
        matching = _matching(pattern, names, known)
        if not matching:
            raise TransitionError(f"the pattern {pattern!r} matches no site; they are named like {names[0]}")
        phases.update(dict.fromkeys(matching, _phase(phase)))
    return phases


def _matching(pattern: object, names: Sequence[str], known: Set[str]) -> list[str]:
    """The names that a pattern is, or fits; known: the same names. Plain names are not looked for one by one."""
    if not isinstance(pattern, str):
        return []
    if not any(sign in pattern for sign in "*?["):
        return [name for name in (pattern, f"{pattern}.weight") if name in known]
    return [name for name in names if name == pattern or fits(name, pattern)]


def _phase(value: object) -> Phase:
    try:
        return Phase(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except ValueError as error:
        raise TransitionError(f"{value!r} is no phase: give Phase.LOW, Phase.FULL or Phase.ADAPTOR") from error
