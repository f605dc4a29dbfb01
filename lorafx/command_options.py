"""What the commands share: the options several of them take, opening folders, and printing results."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .passes.dead_channels import DeadChannels
    from .program import Program


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for decorate in reversed(options):
            function = decorate(function)
        return function

    return add


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
out_option = click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The folder to make.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
task_options = _together(
    click.option("--task", help="Open the checkpoint for a task, e.g. text-classification."),
    click.option("--num-labels", type=int, help="Size of the classification head."),
)
trust_option = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a folder.")
checkpoint_options = _together(
    click.option("--allow-pickle", is_flag=True, help="Load .bin weights (weights only)."), trust_option
)
width_options = _together(
    click.option("--round-to", type=click.IntRange(1), help="Widths left by removing channels: multiples of this."),
    click.option("--keep-at-least", type=click.IntRange(1), help="Never fewer channels than this."),
    click.option("--uniform", is_flag=True, default=None, help="The same widths in every block, as a config can say."),
)
recipe_options = _together(
    click.option("--recipe", type=click.Path(path_type=Path), help="A TOML recipe."),
    click.option("--pass", "passes", multiple=True, help="Append a pass; its options are --NAME.OPTION VALUE."),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from writing progress to stdout and warnings about their own internals to stderr."""
    import warnings

    with warnings.catch_warnings():
        if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
            warnings.simplefilter("ignore")
        yield


def emit(value: Any, text: str, as_json: bool) -> None:
    """Print a result: ``value`` as JSON when asked for, else ``text``."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def removal_of(provider: str, **widths: Any) -> DeadChannels | None:
    """The pass that :data:`width_options` ask for; None without any, so that the recipe decides."""
    from .pipeline import removal_for

    given = {name: value for name, value in widths.items() if value is not None}
    return dataclasses.replace(removal_for(provider), **given) if given else None


def open_program(path: Path, **options: Any) -> Program:
    """The program in a folder: one lorafx wrote, or a checkpoint to capture."""
    from .store import load

    return load(path, **{key: value for key, value in options.items() if value not in (None, False)})
