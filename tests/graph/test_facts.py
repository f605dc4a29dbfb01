"""Facts that are read elsewhere: typed when written and read, plain JSON rows in the history."""

from __future__ import annotations

import json

from lorafx.graph.edit import Edit
from lorafx.graph.facts import Gathered, Removed, ZeroButKept
from lorafx.graph.program import Applied
from lorafx.passes.gather_columns import GatherColumns
from tests import zoo

NARROWED = Gathered("encoder.weight", 1, 32, 21)


def test_what_is_noted_is_a_row_of_json_and_comes_back_as_it_was() -> None:
    program = zoo.captured("bert").copy()
    edit = Edit(program, GatherColumns())
    NARROWED.note(edit)
    assert json.loads(json.dumps(edit.facts)) == {
        "Gathered": [{"weight": "encoder.weight", "dimension": 1, "before": 32, "after": 21}]
    }
    program.history += (Applied(GatherColumns(), facts=edit.facts),)
    assert Gathered.noted(program) == [NARROWED]
    assert Removed.noted(program) == [] == ZeroButKept.noted(program)


def test_rows_of_another_form_under_the_same_title_are_left_to_whoever_wrote_them() -> None:
    program = zoo.captured("bert").copy()
    own = {"Gathered": [{"tokens": 3}, "a sentence", {"weight": "w", "dimension": 0, "before": 2, "after": 1}]}
    program.history += (Applied(GatherColumns(), facts=own),)
    assert Gathered.noted(program) == [Gathered("w", 0, 2, 1)]
    assert program.facts("Gathered") == own["Gathered"]
