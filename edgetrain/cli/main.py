"""``edgetrain``: the command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 1 an error without a class of its own; 2 wrong usage; 3 model and input do not fit; 4 data;
5 memory budget; 6 training cannot go on; 7 storage; 8 export; 9 a package is missing; 130 Ctrl-C;
143 SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from edgetrain.cli.calibrate import calibrate
from edgetrain.cli.demo import demo
from edgetrain.cli.devices import devices
from edgetrain.cli.estimate import estimate
from edgetrain.cli.eval import evaluate
from edgetrain.cli.export import export
from edgetrain.cli.finetune import finetune
from edgetrain.cli.infer import infer
from edgetrain.cli.plan import plan
from edgetrain.cli.report import report
from edgetrain.cli.resume import resume
from edgetrain.cli.train import train
from edgetrain.errors import BudgetError, EdgetrainError, StorageError, UsageError

# typer carries its own copy of click from 0.26 on, and the base of its errors has no public name there
_UsageMistake: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Train convolutional networks inside a hard memory cap.",
    pretty_exceptions_enable=False,
)
_COMMANDS = (
    "demo",
    "train",
    "finetune",
    "resume",
    "eval",
    "plan",
    "estimate",
    "report",
    "export",
    "infer",
    "devices",
    "calibrate",
)
app.command()(demo)
app.command()(train)
app.command()(finetune)
app.command()(resume)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(estimate)
app.command()(report)
app.command()(export)
app.command()(infer)
app.command()(devices)
app.command()(calibrate)


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
        _complain_of(error)
        return error.exit_code
    except _UsageMistake as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _complain_of(_usage_error(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _complain("Found: Ctrl-C. Expected: the command to end by itself. To do: run it again.")
        return 130
    except OSError as error:
        _complain_of(
            StorageError(
                found=str(error),
                expected="files and folders that can be read and written",
                action="check the path and its permissions",
            )
        )
        return StorageError.exit_code
    except MemoryError:
        _complain_of(
            BudgetError(
                found="no memory left on this host",
                expected="a run that fits",
                action="pass --budget with what may be used, or a smaller --batch-size",
            )
        )
        return BudgetError.exit_code


def _usage_error(mistake: Any) -> UsageError:
    command = getattr(getattr(mistake, "ctx", None), "info_name", None)
    return UsageError(
        found=mistake.format_message(),
        expected="arguments that the command takes",
        action=f"see edgetrain {command + ' ' if command in _COMMANDS else ''}--help",
    )


def _complain_of(error: EdgetrainError) -> None:
    """Prints the three parts as one paragraph, and below it each command to run, as it is to be copied."""
    action, *commands = error.action.splitlines()
    found, expected, action = (part.rstrip(". \n") for part in (error.found, error.expected, action))
    end = "" if action.endswith(("?", ":")) else "."
    _complain(f"Found: {found}. Expected: {expected}. To do: {action}{end}")
    for command in commands:
        print(command, file=sys.stderr)


def _complain(text: str) -> None:
    """Prints ``text`` as one paragraph: messages of libraries may have several lines."""
    print(f"edgetrain: {' '.join(text.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
