r"""Target: the parsed text that says where.

A spec is one string or a list of strings. Each item of it is one of

======================  ====================================================================================
``all-linear``          every linear weight except the output layer, as in PEFT
``role:ffn.down``       a role, one of :data:`lorafx.models.roles.ROLES`; a glob works too: ``role:attn.*``
``attention.self.key``  a name: the whole path or its end, as an entry of PEFT's ``target_modules`` list
``*.layer.{0..5,8}.*``  a glob over the whole path: ``*`` (crosses dots), ``?``, ``{a,b}``, ``{0..10..2}``
``.*\.(query|value)``   a regular expression for the whole path, as PEFT's ``target_modules`` string
======================  ====================================================================================

A module that uses several weights, as ``nn.MultiheadAttention`` does, stands for all of them as a name; each has one of
its own: ``attn`` (its fused projection, also ``attn.in_proj_weight``), ``attn.out_proj``.

A stack of matrices, as of a mixture's experts, is taken by an item that says the name of the module it belongs to, too
(``experts.down_proj``, ``*.experts.*``): the end of its path alone names modules, as in PEFT.

``name:``, ``glob:`` and ``re:`` in front remove all doubt. Without them, an item that starts with ``.*`` or
holds any of ``\ ( ) | [ ] ^ $ +`` is a regular expression; else one with ``*``, ``?`` or ``{`` is a glob;
else it is a name. Commas outside brackets separate items within a string: ``"query,value"``. A regular
expression never shares a string, because a comma means something in it: put it in a list. A string that
starts with ``re:`` is one item, commas and all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

from ..errors import UsageError, did_you_mean
from ..models.roles import ROLES, role_of
from .blocks import Blocks

__all__ = ["ROLES", "STACK", "Candidate", "Item", "Selector", "Target", "role_of"]

ALL_LINEAR = "all-linear"
#: The kind of a weight of three dimensions that is used matrix by matrix.
STACK = "stack"
_LINEAR_KINDS = ("linear", "addmm")
_PREFIXES = {"re": "regex", "glob": "glob", "name": "name", "role": "role"}
_PREFIX = re.compile(r"([A-Za-z]+):")
_REGEX_ONLY = frozenset(r"\()|[]^$+")
_GLOB_ONLY = frozenset("*?{")
# A comma reaches a glob only within braces: elsewhere it separates items.
_GLOB_SIGNS = {"*": ".*", "?": ".", "{": "(?:", ",": "|", "}": ")"}
_BRACE_RANGE = re.compile(r"(?<=[{,])([0-9]{1,9})\.\.([0-9]{1,9})(?:\.\.([0-9]{1,9}))?(?=[,}])")
_LONGEST_RANGE = 10_000


class Candidate(Protocol):
    """What a target is matched against: one use of one weight.

    ``module`` is what the weight is called, the path of its module (``bert.encoder.layer.0.attention.self.query``),
    ``kind`` how it is used (``linear``, ``addmm``, ``embedding``, ``conv2d``, …), ``role`` one of
    :data:`lorafx.models.roles.ROLES`, ``block`` the index of the repeated block around it, or None. It may have
    ``names``: others that it answers to, as an item that is a name.
    """

    @property
    def module(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def block(self) -> int | None: ...


@dataclass(frozen=True)
class _Source:
    """A piece of the user's text and where it starts, so that an error can point into what was typed."""

    whole: str
    start: int
    text: str

    def error(self, offset: int, problem: str) -> UsageError:
        return UsageError(f"target {self.whole!r}, column {self.start + offset + 1}: {problem}")

    def after(self, count: int) -> _Source:
        return _Source(self.whole, self.start + count, self.text[count:])


@dataclass(frozen=True)
class Item:
    """One item of a target. ``text`` is what the user wrote, ``body`` the same without a prefix.

    ``kind`` is ``all-linear``, ``name``, ``role``, ``glob`` or ``regex``. The last three have a ``pattern``,
    which must match the whole path (the whole role).
    """

    text: str
    kind: str
    body: str
    pattern: re.Pattern[str] | None = field(default=None, compare=False, repr=False)

    def matches(self, candidate: Candidate) -> bool:
        """Whether this item names ``candidate``."""
        if self.kind == ALL_LINEAR:
            return candidate.kind in _LINEAR_KINDS and candidate.role != "head"
        if self.pattern is None:
            return self.body in _endings(candidate)
        subject = candidate.role if self.kind == "role" else candidate.module
        if self.pattern.fullmatch(subject) is None:
            return False
        other = elsewhere(candidate)
        return other is None or self.pattern.fullmatch(other) is None


def elsewhere(candidate: Candidate) -> str | None:
    """The path that a stack would have in a module of another name: what names that, too, does not name the stack."""
    parts = candidate.module.split(".")
    if candidate.kind != STACK or len(parts) < 2:
        return None
    return ".".join([*parts[:-2], "\N{WHITE SQUARE}", parts[-1]])


def _endings(candidate: Candidate) -> set[str]:
    """The names that are a candidate's: the dotted endings of its path; of a stack those with its module's name."""
    # A module that uses several weights stands for all of them, and each has a name of its own.
    paths = [path.split(".") for path in (candidate.module, *getattr(candidate, "names", ()))]
    alone = candidate.kind == STACK
    return {".".join(parts[start:]) for parts in paths for start in range(max(1, len(parts) - alone))}


@dataclass(frozen=True)
class Target:
    """Where: an ordered set of items. A candidate is named when any item matches it."""

    items: tuple[Item, ...]

    @classmethod
    def parse(cls, spec: str | Sequence[str]) -> Target:
        """Parse a spec as the module's docstring describes it; ``Target.parse(target.spec) == target``.

        Raises :class:`UsageError` with the bad piece and its column.
        """
        strings = [spec] if isinstance(spec, str) else spec
        if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
            raise UsageError(f"target {spec!r}: give a string or a list of strings")
        items = _items(tuple(strings))
        if not items:
            raise UsageError(f"target {spec!r}: names nothing; use 'all-linear' for every linear layer")
        return cls(items)

    @property
    def spec(self) -> tuple[str, ...]:
        """The items' texts: a spec that parses to this target."""
        return tuple(item.text for item in self.items)

    def __str__(self) -> str:
        return ",".join(self.spec)

    def match(self, candidate: Candidate) -> Item | None:
        """The first item that names ``candidate``, or None."""
        first = min(self._matching(candidate), default=None)
        return None if first is None else self.items[first]

    def hits(self, candidates: Iterable[Candidate]) -> dict[str, int]:
        """How many candidates each item names, by the item's text: a misspelt one shows up as 0."""
        found = Counter(place for candidate in candidates for place in self._matching(candidate))
        return {item.text: found[place] for place, item in enumerate(self.items)}

    def _matching(self, candidate: Candidate) -> set[int]:
        """The places of all items that name ``candidate``; names, of which there may be a thousand, are looked up."""
        named = {place for ending in _endings(candidate) for place in self._names.get(ending, ())}
        return named | {place for place in self._others if self.items[place].matches(candidate)}

    @cached_property
    def _names(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for place, item in enumerate(self.items):
            if item.kind == "name":
                places.setdefault(item.body, []).append(place)
        return places

    @cached_property
    def _others(self) -> list[int]:
        return [place for place, item in enumerate(self.items) if item.kind != "name"]

    def why_not(self, candidate: Candidate) -> str:
        """Why no item names ``candidate``, as short text."""
        if any(item.kind == ALL_LINEAR for item in self.items):
            if candidate.kind not in _LINEAR_KINDS:
                return f"{candidate.kind} is not a linear layer"
            return f"{ALL_LINEAR!r} leaves out the output layer"
        if candidate.kind == STACK:
            return f"a stack, taken where {'.'.join(candidate.module.split('.')[-2:])} is named"
        return "not named by targets"


@dataclass(frozen=True)
class Selector:
    """Which candidates a pass takes: named by ``targets``, not by ``exclude``, within ``blocks``."""

    targets: Target
    exclude: Target | None = None
    blocks: Blocks | None = None

    def decide(self, candidate: Candidate, last_block: int) -> str | None:
        """None when ``candidate`` is taken, else the reason why not, as short text."""
        if self.targets.match(candidate) is None:
            return self.targets.why_not(candidate)
        excluder = self.exclude.match(candidate) if self.exclude is not None else None
        if excluder is not None:
            return f"excluded by {excluder.text!r}"
        if self.blocks is None:
            return None
        if candidate.block is None:
            return f"not in a numbered block, and only blocks {self.blocks} are wanted"
        if not self.blocks.contains(candidate.block, last_block):
            return f"block {candidate.block} is outside {self.blocks}"
        return None

    def hits(self, candidates: Iterable[Candidate]) -> dict[str, int]:
        """How many candidates each item of ``targets`` names, before ``exclude`` and ``blocks``."""
        return self.targets.hits(candidates)

    def idle(self, candidates: Iterable[Candidate]) -> list[str]:
        """The items of ``exclude`` that name no candidate; not roles, which cannot be misspelt and which a model may
        well be without."""
        if self.exclude is None:
            return []
        hits = self.exclude.hits(candidates)
        return [item.text for item in self.exclude.items if item.kind != "role" and not hits[item.text]]


@lru_cache
def _items(strings: tuple[str, ...]) -> tuple[Item, ...]:
    # Kept: every site of a pass asks for what the pass is given, which may be a name for each of a thousand modules.
    return tuple(dict.fromkeys(_item(source) for text in strings for source in _split(text)))


def _split(text: str) -> Iterator[_Source]:
    """The items of one string, without surrounding blanks."""
    pieces = [text] if text.lstrip().startswith("re:") else _between_commas(text)
    start = 0
    for piece in pieces:
        source = _Source(text, start + len(piece) - len(piece.lstrip()), piece.strip())
        start += len(piece) + 1
        if not source.text:
            raise source.error(0, "an item is empty; remove the comma or name a module")
        if len(pieces) > 1 and _kind(source)[0] == "regex":
            raise source.error(0, "a regular expression cannot share a string with other items; give a list")
        yield source


def _between_commas(text: str) -> list[str]:
    depth, cuts = 0, [-1]
    for index, char in enumerate(re.sub(r"\\.", "  ", text)):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            cuts.append(index)
    return [text[cut + 1 : end] for cut, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _kind(source: _Source) -> tuple[str, _Source]:
    """The kind of an item and its text without a prefix."""
    text = source.text
    prefix = _PREFIX.match(text)
    if prefix is not None:
        if prefix[1] not in _PREFIXES:
            hint = did_you_mean(prefix[1], _PREFIXES)
            raise source.error(0, f"unknown prefix {prefix[0]!r}{hint}; use role:, name:, glob: or re:")
        return _PREFIXES[prefix[1]], source.after(prefix.end())
    if text.lower() == ALL_LINEAR:
        return ALL_LINEAR, source
    if text.startswith(".*") or not _REGEX_ONLY.isdisjoint(text):
        return "regex", source
    return ("name" if _GLOB_ONLY.isdisjoint(text) else "glob"), source


def _item(source: _Source) -> Item:
    kind, body = _kind(source)
    if not body.text:
        raise body.error(0, f"nothing follows {source.text!r}")
    if kind == ALL_LINEAR:
        return Item(ALL_LINEAR, kind, ALL_LINEAR)
    if kind == "name":
        _check_name(body)
        return Item(source.text, kind, body.text)
    try:
        pattern = re.compile(body.text if kind == "regex" else _glob_regex(body))
    except (re.error, OverflowError) as error:  # the latter for a repetition count beyond the engine's
        offset, problem = (error.pos or 0, error.msg) if isinstance(error, re.error) else (0, str(error))
        raise body.error(offset, f"not a regular expression: {problem}") from error
    if kind == "role" and not any(pattern.fullmatch(role) for role in ROLES):
        hint = did_you_mean(body.text, ROLES)
        raise body.error(0, f"unknown role {body.text!r}{hint}; the roles are {', '.join(ROLES)}")
    return Item(source.text, kind, body.text, pattern)


def _check_name(body: _Source) -> None:
    """Refuse what cannot end a module path, so that a slip is an error here and not zero hits later."""
    slip = re.search(r"[\s}]|^\.|\.(?=\.)|\.$", body.text)
    if slip is not None:
        raise body.error(slip.start(), f"{slip[0]!r} cannot stand here in a module name")


def _glob_regex(source: _Source) -> str:
    """The regular expression of a glob. Braces become alternatives, ranges in them are counted out."""
    text, out, opened, index = source.text, [], [], 0
    while index < len(text):
        char = text[index]
        span = _BRACE_RANGE.match(text, index) if opened else None
        if span is not None:
            out.append(_range_regex(source, span))
            index = span.end()
            continue
        if char == "{":
            opened.append(index)
        elif char == "}" and (not opened or text[index - 1] == "{"):
            raise source.error(index, "'}' without alternatives before it")
        elif char == "}":
            opened.pop()
        elif opened and text.startswith("..", index):
            raise source.error(index, "'..' must stand between whole numbers, as in {0..5} or {0..10..2}")
        out.append(_GLOB_SIGNS.get(char) or re.escape(char))
        index += 1
    if opened:
        raise source.error(opened[-1], "'{' is never closed")
    return "".join(out)


def _range_regex(source: _Source, span: re.Match[str]) -> str:
    first, last, step = int(span[1]), int(span[2]), int(span[3] or 1)
    if step == 0 or abs(last - first) // step >= _LONGEST_RANGE:
        raise source.error(span.start(), f"{span[0]!r} has step 0 or more than {_LONGEST_RANGE} numbers")
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return "|".join(map(str, numbers))
