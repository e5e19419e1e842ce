"""``edgetrain``: the command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 1 an error without a class of its own; 2 wrong usage; 3 model and input do not fit; 4 data;
5 memory budget; 6 training cannot go on; 7 storage; 8 export; 9 a package is missing; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from edgetrain.cli.demo import demo
from edgetrain.cli.train import train
from edgetrain.errors import EdgetrainError

# typer carries its own copy of click from 0.26 on, and the base of its errors has no public name there
_UsageMistake: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train convolutional networks inside a hard memory cap.",
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(train)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from edgetrain import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code; errors made for people are printed on stderr."""
    try:
        result = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        return result if isinstance(result, int) else 0
    except EdgetrainError as error:
        _complain(f"Found: {error.found}. Expected: {error.expected}. To do: {error.action}.")
        return error.exit_code
    except _UsageMistake as error:
        error.show()
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _complain("interrupted.")
        return 130
    except Exception as error:
        if type(error).__name__ != "InterruptedRunError":
            raise
        _complain(f"{error}.")
        return 130


def _complain(text: str) -> None:
    print(f"edgetrain: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
