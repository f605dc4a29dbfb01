"""A report as one page that needs no other file, no script and no font: the answer, pictures, and all the rest folded.

It is laid out for a phone first; whatever may be wide (tables, long names) scrolls inside its own box.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from urllib.parse import quote

from .answer import figures, methods, subject
from .charts import can_draw, svg_of
from .contents import Contents, megabytes
from .facts import Facts
from .ladder import rungs
from .pictures import Picture, pictures
from .render import Section, is_number
from .tables import history, measured, role_section, site_sections

_NO_PICTURES = 'Pictures need matplotlib (pip install "lorafx[report]"); here are their numbers.'


def draw_page(facts: Facts, contents: Contents) -> str:
    """The page of a report, and of the folder it was written for."""
    title = f"{subject(facts)}: {methods(facts)}" if methods(facts) else subject(facts)
    parts = (_head(facts, contents), _ladder(facts), _pictures(facts), _notes(facts), _details(facts), _files(contents))
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(part for part in parts if part))


def _head(facts: Facts, contents: Contents) -> str:
    """What a stranger asks first: what it is, and the figures."""
    task = facts.model.get("task")
    what = " · ".join(part for part in (methods(facts), str(task or ""), str(facts.model.get("dtype") or "")) if part)
    tiles = "".join(
        f"<div class=tile><dt>{html.escape(figure.label)}</dt><dd>{html.escape(figure.value)}</dd>"
        f"<dd class=small>{html.escape(figure.detail)}</dd></div>"
        for figure in figures(facts, contents)
    )
    line = f"<p class=what>{html.escape(what)}</p>" if what else ""
    links = ", ".join(_link(name, size) for name, size in contents.weights)
    made = f"<p class=small>{links}</p>" if links else ""
    return f"<header><h1>{_breakable(subject(facts))}</h1>{line}<dl class=tiles>{tiles}</dl>{made}</header>"


def _breakable(name: str) -> str:
    """A name that a narrow page may break between its words: ``BertForSequence…`` has no other places."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[-_/.])", "<wbr>", html.escape(name))


def _ladder(facts: Facts) -> str:
    found = rungs(facts)
    if len(found) < 2:
        return ""
    items = "".join(
        f"<li><b>{html.escape(rung.name)}</b> <span class=gap>{html.escape(rung.figure)}</span>"
        f"<div class=small>{html.escape(rung.said)}</div></li>"
        for rung in found
    )
    about = "The largest difference from the rung before, as a share of the outputs' scale."
    about += " The deployed model is held against the trained one." if found[-1].name == "deployed" else ""
    return f"<section><h2>The same function?</h2><p class=small>{about}</p><ol class=ladder>{items}</ol></section>"


def _pictures(facts: Facts) -> str:
    found = pictures(facts)
    if not found:
        return ""
    drawn = can_draw()
    figure = "".join(_picture(picture, place, drawn) for place, picture in enumerate(found))
    line = "" if drawn else f"<p>{html.escape(_NO_PICTURES)}</p>"
    return f"{line}<div class=pictures>{figure}</div>"


def _picture(picture: Picture, place: int, drawn: bool) -> str:
    title = f"<h2>{html.escape(picture.title)}</h2><p class=small>{html.escape(picture.note)}</p>"
    if not drawn:
        return f"<section>{title}{_table(picture.table)}</section>"
    chart = svg_of(picture.chart, f"chart{place}", f"{picture.title}. {picture.note}")
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in picture.remarks)
    listed = f"<ol class=small>{remarks}</ol>" if remarks else ""
    return f"<section>{title}{chart}{listed}{_folded('Numbers', _table(picture.table))}</section>"


def _notes(facts: Facts) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in facts.notes)
    return f"<section><h2>To know</h2><ul>{items}</ul></section>" if items else ""


def _details(facts: Facts) -> str:
    """Every table, folded away; what one pass took and passed over together."""
    folded = [_folded(section.title, _table(section)) for section in history(facts.passes)]
    for step in facts.passes:
        parts = [f"<h3>{html.escape(section.title)}</h3>{_table(section)}" for section in site_sections(step)]
        if parts:
            missed = sum(map(len, step.missed.values()))
            folded.append(_folded(f"{step.name}: {len(step.taken)} sites, {missed} missed", "".join(parts)))
    roles = [role_section(facts)] if facts.roles else []
    folded += [_folded(section.title, _table(section)) for section in (*roles, *measured(facts))]
    return f"<section><h2>Everything else</h2>{''.join(folded)}</section>"


def _files(contents: Contents) -> str:
    if not contents.files:
        return ""
    items = "".join(f"<li>{_link(name, size)}</li>" for name, size in contents.files)
    return f"<section><h2>Files</h2>{_folded(f'{len(contents.files)} files', f'<ul>{items}</ul>')}</section>"


def _link(name: str, size: int) -> str:
    return f'<a href="{quote(name)}">{html.escape(name)}</a> <span class=small>{megabytes(size)}</span>'


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def _table(section: Section) -> str:
    head = _row("th", section.columns) if len(section.columns) > 1 else ""
    return f"<div class=scroll><table>{head}{''.join(_row('td', row) for row in section.rows)}</table></div>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(_cell(tag, text) for text in cells)}</tr>"


def _cell(tag: str, text: str) -> str:
    kind = " class=number" if tag == "td" and text and is_number(text) else ""
    return f"<{tag}{kind}>{html.escape(text)}</{tag}>"


_STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #8881; --quiet: #5b6470; --blue: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --quiet: #9aa4b0; --blue: #7fb2ee; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.05rem; margin: 0 0 .25rem; }
h3 { font-size: .9rem; margin: .75rem 0 0; }
p { margin: .25rem 0; }
a { color: var(--blue); }
section { margin: 1.75rem 0; min-width: 0; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; font-family: system-ui, sans-serif; }
.what { font-size: 1.05rem; }
.small { color: var(--quiet); font-size: .85rem; line-height: 1.4; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); background: var(--soft); border-radius: .5rem; padding: .6rem .8rem;
  min-width: 0; }
.tile dt { color: var(--quiet); font-size: .85rem; }
.tile dd { margin: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.25; }
.tile dd.small { font-size: .8rem; font-weight: 400; margin-top: .25rem; }
.ladder { list-style: none; margin: .75rem 0 0; padding: 0; }
.ladder li { border-left: 3px solid var(--blue); padding: 0 0 .8rem 1rem; position: relative; }
.ladder li::before { content: ""; position: absolute; left: -.5rem; top: .35rem; width: .8rem; height: .8rem;
  border-radius: 50%; background: var(--blue); }
.ladder li:last-child { padding-bottom: 0; }
.gap { font-variant-numeric: tabular-nums; margin-left: .5rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 2rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; margin: .25rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2em .8em .2em 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: normal; min-width: 3em; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin: .25rem 0; }
summary { cursor: pointer; padding: .15rem 0; }
ul, ol.small { padding-left: 1.2rem; margin: .25rem 0; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
{body}
</body></html>
"""
