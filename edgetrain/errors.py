"""Every error a person may see: what was found, what was expected, what to do.

Each class carries the exit code of the command line (documented in ``docs/cli.md``), so that a script
can tell the causes apart.
"""

from __future__ import annotations


class EdgetrainError(Exception):
    """Base of all errors raised on purpose; prints as one paragraph in three parts.

    Attributes:
        found: what is wrong, with its values.
        expected: what would have been right.
        action: what the person can do about it.
        exit_code: status with which the command line ends.
    """

    exit_code = 1

    def __init__(self, *, found: str, expected: str, action: str) -> None:
        self.found = found
        self.expected = expected
        self.action = action
        super().__init__(f"{found}; expected {expected}: {action}")

    def __reduce__(self) -> tuple[object, ...]:
        """Errors go from one process to another whatever their constructors take."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[EdgetrainError], args: tuple[object, ...], fields: dict[str, object]) -> EdgetrainError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class UsageError(EdgetrainError):
    """An argument is wrong: an unknown name, a malformed size, an option out of range."""

    exit_code = 2


class ModelError(EdgetrainError):
    """The model and its input do not fit together: shapes, channel counts, modes a block cannot do."""

    exit_code = 3


class DataError(EdgetrainError):
    """The data cannot be used: missing, empty class, labels out of range, too many broken images."""

    exit_code = 4


class BudgetError(EdgetrainError):
    """The memory budget cannot hold what was asked for, before the run or during it."""

    exit_code = 5


class TrainingError(EdgetrainError):
    """Training cannot go on: the loss is not a number."""

    exit_code = 6


class StorageError(EdgetrainError):
    """A file cannot be written or read: disk full, damaged checkpoint."""

    exit_code = 7


class ExportError(EdgetrainError):
    """An export failed its verification or could not be written."""

    exit_code = 8


class MissingExtraError(EdgetrainError):
    """An optional package is not installed."""

    exit_code = 9


def near_matches(name: str, known: list[str]) -> str:
    """Text that lists the names in ``known`` closest to ``name``, or all of them where none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=4, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(sorted(known))}"
