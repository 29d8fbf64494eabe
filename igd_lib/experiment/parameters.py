"""A notebook's parameters, checked: papermill adds misspelt names without a word."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from igd_lib.experiment.run import Run

SCALES = ("auto", "smoke", "small", "rehearsal", "paper")


def read(namespace: Mapping[str, Any], **types: type) -> SimpleNamespace:
    """A notebook's parameters from its globals, checked: every name known, every value of its type.

    A parameter is what a cell of nothing but literal assignments sets: the notebook's own parameters cell,
    and the one that papermill adds below it. Cells run before the parameters cell was last run do not count,
    nor do variables that other cells make. An int passes for a float; a number, or a list of numbers or
    words, for its text. What all notebooks share is `run` of the result. Raises NameError or TypeError with
    the nearest known name, ValueError for a scale that there is not, and as `Run`.
    """
    for name in _set_by_hand(namespace, types):
        close = difflib.get_close_matches(name, types, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(types)}"
        raise NameError(f"unknown notebook parameter {name!r}; {hint}")
    found = {name: _typed(name, kind, namespace) for name, kind in types.items()}
    if found.get("scale", "auto") not in SCALES:
        raise ValueError(f"scale is one of {', '.join(SCALES)}, got {found['scale']!r}")
    return SimpleNamespace(**found, run=Run.of(found))


def _typed(name: str, kind: type, namespace: Mapping[str, Any]) -> Any:
    """The value of a parameter, if it is of its type."""
    if name not in namespace:
        raise NameError(f"the notebook's parameters cell lacks {name!r}")
    value = namespace[name]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str:
        value = _text(value)
    if type(value) is not kind:
        raw = f"; papermill takes text as it is by -r {name} TEXT" if kind is str else ""
        raise TypeError(
            f"notebook parameter {name!r} is {kind.__name__}, got {value!r} ({type(value).__name__}){raw}"
        )
    return value


def _text(value: Any) -> Any:
    """The text that papermill made a number of (`-p ks 30`), and a list's, separated by commas.

    Other values as they are: True or None may have been written in several ways, and a text with a comma is
    no one entry of a list.
    """
    if type(value) in (list, tuple):
        parts = [_text(part) for part in value]
        plain = parts and all(type(part) is str and part and "," not in part for part in parts)
        return ",".join(parts) if plain and not any(type(part) in (list, tuple) for part in value) else value
    finite = type(value) is int or (type(value) is float and math.isfinite(value))
    return repr(value) if finite else value


def _set_by_hand(namespace: Mapping[str, Any], types: Mapping[str, type]) -> list[str]:
    """The names that parameter cells have set and that no parameter has."""
    history = namespace.get("In")
    if not isinstance(history, Sequence):  # no notebook: every plain value counts
        plain = (bool, int, float, str, list, tuple, dict, type(None))
        named = [
            name for name, value in namespace.items() if not name.startswith("_") and isinstance(value, plain)
        ]
        return [name for name in named if name not in types]
    cells = [literals(str(source)) for source in history]
    first = max((number for number, names in enumerate(cells) if set(types) <= set(names)), default=0)
    recent = dict.fromkeys(name for names in cells[first:] for name in names)
    return [name for name in recent if name not in types and name in namespace]


def literals(source: str) -> list[str]:
    """The names that a cell of nothing but assignments of literals sets; empty for any other cell."""
    try:
        statements = ast.parse(source).body
        names = []
        for statement in statements:
            if isinstance(statement, ast.Assign):
                targets, value = statement.targets, statement.value
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                targets, value = [statement.target], statement.value
            else:
                return []
            ast.literal_eval(value)
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    except (SyntaxError, ValueError, TypeError):  # magics, and values that are no literals
        return []
    return names
