"""The program people hold: the data of :mod:`lorafx.graph.program`, with the methods that lead on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .formats.run import save_run
from .graph import program
from .graph.call import flatten
from .reporting.report import Report, report_of
from .training.module import RewrittenModel, build_module


@dataclass(repr=False)
class Program(program.Program):
    """One captured model: its data is that of :class:`lorafx.graph.program.Program`. Rewrites return a new one."""

    def module(self) -> RewrittenModel:
        """An ordinary ``nn.Module`` over this program's tensors: training graph and evaluation graph in one."""
        return build_module(self)

    def flatten(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The graph's positional inputs for keyword ``inputs`` (see :func:`lorafx.graph.call.arguments`)."""
        return flatten(self, inputs)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write a run folder (see :mod:`lorafx.formats.run`): what was learned, the recipe, a reference to the base."""
        save_run(self, path, overwrite=overwrite)

    @property
    def report(self) -> Report:
        """What happened so far, as one value."""
        return report_of(self)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()
