"""Values that the options of a pass may have, for property tests."""

from __future__ import annotations

import types
import typing
from typing import Any

from hypothesis import strategies as st

from ..base import Pass
from ..errors import RecipeError
from ..ranges import Range, range_of
from ..recipes.registry import options

STRINGS = st.text(st.characters(exclude_categories=["Cs"]))


def values_of(hint: Any, within: Range | None = None) -> st.SearchStrategy[Any]:
    """Values of an option's type, out of the closed set of types an option may have, and inside its range."""
    if within is not None:
        hint = next(
            arg for arg in (hint, *typing.get_args(hint)) if arg in (int, float, dict[str, int], dict[str, float])
        )
        if typing.get_origin(hint) is dict:
            return st.dictionaries(STRINGS, values_of(typing.get_args(hint)[1], within), max_size=4)
        return numbers_in(hint, within)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args if arg is not type(None)])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(values_of(args[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=4)
    plain = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: STRINGS,
    }
    return plain[hint]


def numbers_in(kind: type, within: Range) -> st.SearchStrategy[Any]:
    """Numbers inside a range."""
    low = within.least if within.least is not None else within.above
    high = within.most if within.most is not None else within.below
    if kind is int:
        drawn = st.integers(-(2**63) if low is None else int(low), 2**63 - 1 if high is None else int(high))
    else:
        drawn = st.floats(low, high, allow_nan=False, allow_infinity=False)
    return drawn.filter(lambda value: within.flaw(value) is None)


def options_of(cls: type[Pass]) -> st.SearchStrategy[dict[str, Any]]:
    """Options of a pass, each left out or with a value of its type and range; only such as it takes together."""
    hints = typing.get_type_hints(cls)
    drawn = {key: values_of(hints[key], range_of(field)) for key, field in options(cls).items()}

    def taken(given: dict[str, Any]) -> bool:
        if not _refused(cls, given):
            return True
        alone = [name for name, value in given.items() if _refused(cls, {name: value})]
        assert not alone, f"{cls.__name__} refuses {alone[0]} by itself, which has its option's type and range"
        return False

    return st.fixed_dictionaries({}, optional=drawn).filter(taken)


def _refused(cls: type[Pass], given: dict[str, Any]) -> bool:
    try:
        cls(**given)
    except RecipeError:
        return True
    return False
