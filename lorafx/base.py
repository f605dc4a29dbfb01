"""The contract of a pass: what it selects, how it rewrites one site, and what it promises about the numbers.

A pass is a frozen dataclass. Its fields are its options, declared once with :func:`option`; recipe keys, command-line
flags, help texts and provenance all derive from them. A pass holds no run state.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import NoSitesError
from .graph.blocks import Blocks
from .graph.nearest import nearest
from .graph.selection import Miss, Selection
from .graph.target import Selector, Target
from .ranges import Range, check_ranges

if TYPE_CHECKING:
    from torch import Tensor

    from .graph.edit import Edit
    from .graph.program import Applied, Program
    from .graph.site import Site
    from .graph.state import MethodState


class Promise(enum.Enum):
    """What a pass keeps of the evaluation outputs; the pipeline and the law suite hold it to that."""

    EXACT = "exact"  # every output bit
    CLOSE = "close"  # equal up to rounding: the tolerance of the dtype
    SHAPES = "shapes"  # the outputs' shapes and dtypes
    NOTHING = "nothing"


def option(
    default: Any,
    about: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    group: str = "",
    unset: str = "none",
) -> Any:
    """Declare one option: its default, its help line, the range of its numbers, the group of options that it starts in
    the help, and, in words, the meaning of a default of None (``unset``).

    ``least`` and ``most`` are allowed themselves, ``above`` and ``below`` are not; numbers are finite. The range is
    checked when the options are made (:class:`Options`), so that TOML, flags and Python agree. Mappings are copied, so
    that passes never share one.
    """
    metadata: dict[str, Any] = {"help": about, "group": group, "unset": unset}
    allowed = Range(least, most, above, below, whole=type(default) is int)
    if str(allowed) or type(default) in (int, float):
        metadata["range"] = allowed
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of the frozen dataclasses whose fields are options: one cannot be made with a value outside its range."""

    @classmethod
    def title(cls) -> str:
        """The name of these options in messages."""
        return cls.__name__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__")
        if own is not None:  # a subclass's further checks come after the ranges, and cannot replace them

            @functools.wraps(own)
            def checked(self: Options) -> None:
                Options.__post_init__(self)
                own(self)

            cls.__post_init__ = checked

    def __post_init__(self) -> None:
        check_ranges(self, self.title())


@dataclass(frozen=True)
class Pass(Options):
    """One rewrite of a program. Subclasses set ``promise`` and implement :meth:`sites` and :meth:`rewrite`."""

    promise: ClassVar[Promise] = Promise.CLOSE
    #: Run again until nothing is selected (compiler simplifications).
    fixed_point: ClassVar[bool] = False

    @classmethod
    def pass_name(cls) -> str:
        """The name used in recipes: the file's name with dashes (``tied_lora.py`` gives ``tied-lora``)."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def title(cls) -> str:
        return cls.pass_name()

    def sites(self, program: Program) -> Selection[Any]:
        """Select what to rewrite. Pure: the program is only read."""
        raise TypeError(f"pass {self.pass_name()!r} does not say what it selects: define sites()")

    def rewrite(self, edit: Edit, site: Any) -> None:
        """Rewrite one selected site through ``edit``, the only hand that changes a graph."""
        raise TypeError(f"pass {self.pass_name()!r} does not say how it rewrites: define rewrite()")

    def finish(self, edit: Edit) -> None:
        """Called once after every site was rewritten; nothing by default."""


@dataclass(frozen=True)
class SitePass(Pass):
    """A pass over the uses of weights, selected by PEFT-style target strings."""

    targets: str | tuple[str, ...] = option(
        "all-linear", "where: all-linear, module names as in PEFT, globs with braces, regular expressions, role:NAME"
    )
    exclude: tuple[str, ...] = option((), "module names, globs or regular expressions to leave out")
    blocks: str | int | tuple[int, ...] | None = option(
        None, "only these blocks, e.g. 0..5 or 0..2,11 or -1", unset="all"
    )
    allow_empty: bool = option(False, "selecting nothing is not an error")

    #: Kinds of site the pass can rewrite, and why it does not others.
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm")
    unhandled: ClassVar[Mapping[str, str]] = {}

    def refuse(self, program: Program, site: Site) -> str | None:
        """A reason not to take ``site`` beyond what the targets say, or None. Raise when the user must decide."""
        if site.kind not in self.kinds:
            return self.unhandled.get(site.kind, f"{self.pass_name()} does not handle {site.kind} weights")
        return None

    def refusing(self, program: Program) -> Callable[[Site], str | None]:
        """:meth:`refuse` for all sites of a program: looks up once what they share."""
        return functools.partial(self.refuse, program)

    def sites(self, program: Program) -> Selection[Any]:
        """What to rewrite: :meth:`uses`, or something derived from them."""
        return self.uses(program)

    def uses(self, program: Program) -> Selection[Site]:
        """Every weight use that the targets name and the pass can handle; the others with their reasons."""
        selector = Selector(
            Target.parse(self.targets),
            Target.parse(self.exclude) if self.exclude else None,
            Blocks.parse(self.blocks) if self.blocks is not None else None,
        )
        found = program.sites()
        taken: list[Site] = []
        missed: list[Miss[Site]] = []
        refuse = self.refusing(program)
        for site in found:
            reason = selector.decide(site, site.blocks - 1) or _inserted(program, site) or refuse(site)
            taken.append(site) if reason is None else missed.append(Miss(site, reason))
        if not self.allow_empty:
            self._check_hits(program, selector, found, taken, missed)
        return Selection(tuple(taken), tuple(missed))

    def _check_hits(
        self, program: Program, selector: Selector, found: list[Site], taken: list[Site], missed: list[Miss[Site]]
    ) -> None:
        name = self.pass_name()
        for item, hits in selector.hits(found).items():
            if hits == 0:
                hint = _used_as(program, item, found) or nearest(item, found)
                raise NoSitesError(f"{name}: target {item!r} matched 0 of {len(found)} weight uses{hint}")
        for item in selector.idle(found):
            raise NoSitesError(
                f"{name}: exclude {item!r} leaves out 0 of {len(found)} weight uses{nearest(item, found)}"
            )
        if not taken:
            # A target that the pass cannot take is more telling than one that matches nothing.
            named = [miss for miss in missed if selector.decide(miss.site, miss.site.blocks - 1) is None] or missed
            reasons = sorted({f"{miss.site.module}: {miss.reason}" for miss in named})[:2]
            raise NoSitesError(
                f"{name}: targets {self.targets!r} took 0 of {len(found)} weight uses; {'; '.join(reasons)}"
                f" (set allow_empty = true if that is meant)"
            )

    def check_taken(self, selection: Selection[Any]) -> None:
        """NoSitesError when every weight that the targets name is a miss, so that nothing would be rewritten."""
        if not selection.taken and not self.allow_empty:
            why = f"; {selection.missed[-1].site}: {selection.missed[-1].reason}" if selection.missed else ""
            raise NoSitesError(
                f"{self.pass_name()}: targets {self.targets!r} name weights, and it can take none of them{why}"
                " (set allow_empty = true if that is meant)"
            )


def _used_as(program: Program, item: str, found: list[Site]) -> str:
    """For the name of a module that the model has but does not run: how its weight, tied to others, is used."""
    owned = {
        id(value)
        for path in program.modules_named(item)
        for value in program.root.get_submodule(path).parameters(recurse=False)
    }
    uses = list(dict.fromkeys(site.module for site in found if id(program.tensor(site.parameter)) in owned))
    return f" (the model does not run it; its weight is that of {', '.join(uses[:4])})" if uses else ""


def _inserted(program: Program, site: Site) -> str | None:
    # What a pass inserts runs as part of the module it adapts, so it answers to that module's name.
    inserted = program.roles.get(site.parameter) in ("adapter", "gate", "statistic")
    return "inserted by an earlier pass" if inserted else None


@dataclass(frozen=True)
class Method(SitePass):
    """A pass that also shapes training. All run state lives in the module's buffers, reached through ``state``."""

    def penalty(self, state: MethodState) -> Tensor | None:
        """A scalar added to the loss of every training forward, or None."""
        return None

    def before_step(self, state: MethodState) -> None:
        """Called with the final (accumulated, reduced, unscaled, clipped) gradients, before the optimiser steps."""

    def after_step(self, state: MethodState) -> None:
        """Called after each optimiser step: schedules, masks, multipliers."""

    def settled(self, state: MethodState) -> bool:
        """Whether the current weights keep the method's promise; not while a schedule is under way.

        The best of several checkpoints is chosen among those that do, and early stopping waits for it.
        """
        return True

    def conclude(self, state: MethodState) -> None:
        """Make the current weights keep the method's promise: called once if training ends before its last step."""

    def optimiser(self) -> Mapping[str, Mapping[str, float]]:
        """Optimiser settings in which inserted parameters differ, by short name: ``{"gate": {"lr": 2e-2}}``."""
        return {}

    def describe(self, state: MethodState) -> Mapping[str, Any]:
        """What was learned, for the report: titles and JSON values (a list of objects is shown as a table)."""
        return {}


def passes_of(program: Program) -> list[Pass]:
    """The passes in a program's history, oldest first."""
    return [applied.step for applied in program.history if isinstance(applied.step, Pass)]


def methods_of(program: Program) -> list[tuple[Method, Applied]]:
    """The methods in a program's history that took a site: one that took none has nothing to train or to report."""
    return [(made.step, made) for made in program.history if isinstance(made.step, Method) and made.taken]
