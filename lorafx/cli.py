"""The command line. Results go to stdout, progress and logs to stderr; errors are one line and a stable exit code.

Nothing heavy is imported until a command needs it, so that ``lorafx --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from .commands.check import check, check_merge
from .commands.edit import edit, patch
from .commands.look import bench, generate, inspect, latency, passes, report, verify
from .commands.make import export, fold, rewrite, run, train
from .commands.new_pass import new_pass
from .errors import ArtifactError, LorafxError, first_line
from .files.whole import failure_of
from .files.whole import said as what_to_do
from .version import __version__

# A new command is imported above and named here; its module must not import torch or transformers when imported.
_COMMANDS = (
    *(rewrite, train, fold, export, run),
    *(verify, check, check_merge, bench, generate),
    *(inspect, report, latency, passes, new_pass, edit, patch),
)


class _Group(click.Group):
    """Prints lorafx's errors as one line and turns them into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.get("debug", False)
        try:
            return super().invoke(ctx)
        except (LorafxError, click.ClickException, click.Abort, click.exceptions.Exit) as error:
            if debug or not isinstance(error, LorafxError):
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as error:
            _fail(str(error) or "interrupted", 130)
        except BrokenPipeError:  # the reader closed the pipe (head, say): click exits quietly
            raise
        except Exception as error:
            if debug:
                raise
            failure = failure_of(error)
            if failure is not None:  # of a disk, though no command says so itself
                where = failure.filename or "a file or the standard output"
                _fail(f"{where}: cannot be used: {what_to_do(failure)}", ArtifactError.exit_code)
            if isinstance(error, OSError) and error.filename is not None:  # a file, likewise
                _fail(f"{error.filename}: cannot be used: {error.strerror}", ArtifactError.exit_code)
            said = f"{type(error).__name__}: {first_line(error)}"
            _fail(f"internal error: {said} (run again with --debug for the traceback)", 1)


def _fail(message: str, code: int) -> NoReturn:
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in [*getattr(bars, "_instances", ())]:  # left open by the error, whose line would go on theirs
        bar.close()
    click.echo(f"lorafx: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lorafx")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--verbose", "-v", is_flag=True, help="Show the libraries' own logs.")
def main(debug: bool, verbose: bool) -> None:
    """A compiler for fine-tuned models: rewrite, train, fold, export, and prove each step.

    Exit codes: 0 ok, 1 internal, 2 usage, 3 capture unsupported, 4 parity failed, 5 unusable file.
    """
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TORCH_LOGS", "-export")


for _command in _COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main()
