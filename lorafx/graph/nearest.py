"""What may have been meant by an item of a target that names nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import did_you_mean
from .target import ALL_LINEAR, Candidate, Item, Target, elsewhere


def nearest(spec_item: str, candidates: Iterable[Candidate]) -> str:
    """For an item that :meth:`Selector.hits` counts 0: what may have been meant, to append to a message."""
    item = Target.parse(spec_item).items[0]
    found = list(candidates)
    paths = list(dict.fromkeys(candidate.module for candidate in found))
    if not found or item.kind == ALL_LINEAR:
        return ""
    if item.kind == "role":
        return f" (roles here: {', '.join(sorted({candidate.role for candidate in found}))})"
    whole = [candidate.module for candidate in found if elsewhere(candidate) is not None]
    stacks = sorted({".".join(path.split(".")[-2:]) for path in whole if path.rpartition(".")[2] == item.body})
    if stacks:
        return f" (did you mean the stacks {', '.join(stacks)}?)"
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    names = ", ".join(ends[:6]) + (", …" if len(ends) > 6 else "")
    return _wider(item, paths) or _misspelt(item, paths) or f" (names here: {names})"


def _wider(item: Item, paths: list[str]) -> str:
    """The usual mistake: the item fits a part of a path where it has to fit all of it (a name: its end)."""
    if item.kind == "regex":
        inside = item.pattern is not None and any(item.pattern.search(path) for path in paths)
        return " (it must match the whole path: begin and end it with '.*')" if inside else ""
    glob = item.body if item.kind == "glob" else re.sub(r"[*?{},]", "?", item.body)
    for wider in (f"*.{glob}", f"{glob}.*", f"*.{glob}.*"):
        pattern = Target.parse(f"glob:{wider}").items[0].pattern
        if pattern is not None and any(pattern.fullmatch(path) for path in paths):
            return f" (did you mean {wider!r}?)"
    return ""


def _misspelt(item: Item, paths: list[str]) -> str:
    """The closest suffix for a name; else the closest component for the first word that no path has."""
    if item.kind == "name":
        length = item.body.count(".") + 1
        suffixes = dict.fromkeys(".".join(path.split(".")[-length:]) for path in paths)
        close = did_you_mean(item.body, [*suffixes, ALL_LINEAR])
        if close:
            return close
    words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\\.", ".", item.body))
    known = dict.fromkeys(part for path in paths for part in path.split("."))
    return next((close for word in words if word not in known and (close := did_you_mean(word, known))), "")
