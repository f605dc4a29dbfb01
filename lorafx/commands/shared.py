"""What the commands share: the options several of them take, opening folders, and printing results."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from ..base import Pass
    from ..public import Program
    from ..reporting.report import Report


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for decorate in reversed(options):
            function = decorate(function)
        return function

    return add


class _Place(click.Path):
    """A path. An empty one, which a shell makes of a variable that is not set, would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty (a variable that is not set?); write . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Place(path_type=Path)

check_option = click.option(
    "--check/--no-check", default=True, help="Check what passes promise, and compare what is written with the program."
)
#: For a command that writes what can be compared more or less closely.
check_options = _together(
    click.option(
        "--check",
        type=click.Choice(["auto", "tensors", "blocks", "full"]),
        is_flag=False,
        flag_value="auto",
        default=None,
        help="How the files are compared with the program: each tensor; tensors and blocks; or the whole function "
        "(default: blocks for weights that stream, else full). What passes promise is checked too.",
    ),
    click.option("--no-check", is_flag=True, help="Check no promise of a pass, and compare nothing."),
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
out_option = click.option("--out", "-o", required=True, type=PATH, help="The folder to make.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is already there.")
provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime is to be fast: uses its fused operators, and for cuda widths in multiples of 8.",
)
details_option = click.option("--details", is_flag=True, help="Print every table, and every site and miss.")


def _tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from ..models.tasks import TASKS

    return [name for name in TASKS if name.startswith(incomplete)]


def complete_passes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The names of passes, for the completion of shells."""
    from ..recipes.registry import known

    return [name for name in known() if name.startswith(incomplete)]


task_options = _together(
    click.option("--task", help="Open the checkpoint for a task, e.g. text-classification.", shell_complete=_tasks),
    click.option("--num-labels", type=int, help="Size of the classification head."),
)
trust_option = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the folder.")
#: For a command that opens a checkpoint: how.
checkpoint_options = _together(
    click.option("--allow-pickle", is_flag=True, help="Load .bin weights (weights only)."), trust_option
)
#: For a command that opens a folder which may be a run: how its base is opened, and where it is.
opening_options = _together(
    checkpoint_options,
    click.option("--base", type=PATH, help="Where the base checkpoint of a run is now."),
)
stream_option = click.option(
    "--stream/--no-stream",
    default=None,
    help="Compute weights as they are written, for models larger than memory, in a checkpoint or in a graph that "
    "generates (default: when they take over 1 GB).",
)
adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="A PEFT adapter to put on the checkpoint: FOLDER, or FOLDER=WEIGHT (repeat: their updates are summed).",
)
width_options = _together(
    click.option("--round-to", type=click.IntRange(1), help="Leave widths in multiples of this."),
    click.option("--keep-at-least", type=click.IntRange(1), help="Never leave fewer channels than this."),
    click.option("--uniform", is_flag=True, default=None, help="Leave the same widths in every block."),
)
recipe_options = _together(
    click.option("--recipe", type=PATH, help="A TOML recipe."),
    click.option(
        "--pass",
        "passes",
        multiple=True,
        help="Append a pass; its options are --NAME.OPTION VALUE.",
        shell_complete=complete_passes,
    ),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from writing progress to stdout and warnings about their own internals to stderr."""
    import warnings

    with warnings.catch_warnings():
        if os.environ.get("TRANSFORMERS_VERBOSITY") == "error":
            warnings.simplefilter("ignore")
        yield


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Collect garbage a hundred times less often. Commands load, trace and plan millions of small objects that stay and
    have few cycles, and searching them takes a tenth of the time."""
    often, *rest = gc.get_threshold()
    gc.set_threshold(100 * often, *rest)
    try:
        yield
    finally:
        gc.set_threshold(often, *rest)


def emit(value: Any, text: str, as_json: bool) -> None:
    """Print a result: ``value`` as JSON when asked for, else ``text``."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def tell(report: Report, given: dict[str, Any], next_step: str, folder: Path | None = None) -> None:
    """Print a report: the answer and what to do next, or all of it (``--details``), or JSON (``--json``).

    ``folder`` is what was written.
    """
    text = report.text(details=given["details"], next_step=next_step, folder=folder)
    emit(report.to_json(), text, given["as_json"])


#: What the classes of models are called that write texts token by token.
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def after_all(out: Path, name: str) -> str:
    """What to do with what ``lorafx run`` made of a model whose class has this name."""
    cached = f"; lorafx export {out / 'run'} -o DECODER --generate, for the same with its cache"
    return f"lorafx report {out} --open{cached if name.endswith(_WRITERS) else ''}"


def widths(given: dict[str, Any]) -> dict[str, Any]:
    """The values of :data:`width_options` among a command's options."""
    return {name: given[name] for name in ("round_to", "keep_at_least", "uniform")}


def removal_of(provider: str, **asked: Any) -> Pass | None:
    """The pass that :data:`width_options` ask for; None without any, so that the recipe decides."""
    from ..pipeline import removal_for

    given = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(removal_for(provider), **given) if given else None


def check_of(given: dict[str, Any]) -> Any:
    """What :data:`check_options` ask for, as :func:`lorafx.export` takes it."""
    if given["no_check"] and given["check"]:
        raise UsageError("--check and --no-check are opposites; give one of them")
    return not given["no_check"] if given["check"] in (None, "auto") else given["check"]


def opening(given: dict[str, Any]) -> dict[str, Any]:
    """The values of :data:`opening_options` among a command's options."""
    return {name: given[name] for name in ("allow_pickle", "trust_remote_code", "base")}


def adapters_of(texts: tuple[str, ...]) -> dict[str, float] | None:
    """The folders and weights of ``--adapter``; None without any. UsageError for one that was given twice."""
    found: dict[str, float] = {}
    for text in texts:
        folder, equals, number = text.rpartition("=")
        plain = not equals or Path(text).is_dir()
        try:
            folder, weight = (text, 1.0) if plain else (folder, float(number))
        except ValueError:
            raise UsageError(f"--adapter {text}: {number!r} is not a weight; write FOLDER or FOLDER=0.5") from None
        if folder in found:
            raise UsageError(f"--adapter {folder} was given twice; give it once, with a weight (FOLDER=2)")
        found[folder] = weight
    return found or None


def streams(run: Path, base: Path | None, asked: bool | None) -> bool:
    """Whether weights are to be computed as they are written: as asked for, or by their size.

    Smaller ones fit into memory a few times over, and each pass is then held to its promise by itself.
    """
    from ..frontend.load import weight_bytes

    return asked if asked is not None else weight_bytes(run, base) > 1 << 30


def read_lines(file: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank; ArtifactError when it cannot be read as text."""
    from ..errors import ArtifactError

    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: cannot be read as text ({error}); give a UTF-8 file, a text a line") from None
    return tuple(line for line in lines if line.strip())


def check_new_file(file: Path, option: str, overwrite: bool) -> None:
    """Refuse to replace a file, or to begin work whose result has no folder to go to; ``option`` is what names it."""
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists; choose another {option}, or add --overwrite")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{file}: its folder does not exist; choose another {option}")
    if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"{file}: its folder may not be written to; choose another {option}")


def write_page(file: Path, text: str) -> None:
    """Write a page, whole or not at all; ArtifactError where it cannot be."""
    from ..files.whole import write_whole

    write_whole(file, text)


def open_program(path: Path, *, check: bool = True, **options: Any) -> Program:
    """The program in a folder: one lorafx wrote, or a checkpoint to capture."""
    from ..frontend.load import load

    return load(path, check=check, **{key: value for key, value in options.items() if value not in (None, False)})


def class_of(checkpoint: Path) -> str:
    """The class of transformers that opens a checkpoint that was just written."""
    from ..models.checkpoint import read_config
    from ..models.tasks import auto_class_of

    return auto_class_of(read_config(checkpoint)) or "AutoModel"


def opened_by(out: Path, kind: str, run: Path = Path("RUN")) -> str:
    """What to do with what was written: others open most of it."""
    if kind == "hf":
        return f"{class_of(out)}.from_pretrained({str(out)!r}), in transformers"
    return {
        "onnx": f"lorafx bench {run} {out}",
        "generate": f"lorafx generate {out} --prompt TEXT",
        "sound": f"AutoModelForSpeechSeq2Seq.from_pretrained({str(out)!r}), in transformers.js",
        "slots": f"lorafx export {run} --format onnx-adapter --slots {out} -o ADAPTER",
        "onnx-adapter": f"ONNX Runtime's LoraAdapter takes it, over the base with the slots; it is in {out}",
        "layered": f"lorafx export {out} -o ONNX; transformers does not read its widths yet, lorafx does",
        "peft": f"PeftModel.from_pretrained(base, {str(out)!r}), in PEFT",
        "pt2": f"ExportedModel.from_pretrained({str(out)!r}, trust_remote_code=True), in transformers",
    }[kind]
