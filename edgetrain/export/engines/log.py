"""What a TensorRT builder says while it builds: its errors and warnings, and the memory that the engine will take.

The interface has no call that gives the memory of an engine without loading it, which needs a GPU. The log does:
``Total Activation Memory: N``, ``Total Weights Memory: N`` and ``Total Scratch Memory: N`` (``Max Scratch Memory`` in
later releases), in bytes; the last of several lines about one kind holds. What a release does not print is None.
"""

from __future__ import annotations

import logging
import re
from types import ModuleType
from typing import Protocol

_MEMORY = re.compile(r"(?:Total|Max) (Activation|Weights|Scratch) Memory: (\d+)")
_KEPT_MESSAGES = 8
_LEVELS = {0: logging.ERROR, 1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO}
_logger = logging.getLogger(__name__)


class BuildLog(Protocol):
    """A logger that builder, parser and refitter take.

    Attributes:
        errors: messages of severity error and above, oldest first.
        warnings: each once, in order.
        memory_bytes: by kind in lower case, such as ``"activation"``.
    """

    errors: list[str]
    warnings: list[str]
    memory_bytes: dict[str, int]


def build_log(trt: ModuleType) -> BuildLog:
    """A fresh log for the package ``trt``; it must outlive what was made with it."""

    class Log(trt.ILogger):  # type: ignore[name-defined]  # the base class is known when the package is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.memory_bytes: dict[str, int] = {}

        def log(self, severity: object, message: str) -> None:
            level = int(severity)  # type: ignore[call-overload]
            _logger.log(min(_LEVELS.get(level, logging.DEBUG), logging.INFO), "%s", message)
            if level <= 1:
                self.errors.append(message)
            elif level == 2 and message not in self.warnings:
                self.warnings.append(message)
            if (match := _MEMORY.search(message)) is not None:
                self.memory_bytes[match[1].lower()] = int(match[2])

    return Log()


def last_errors(log: BuildLog) -> str:
    """The errors as one text for a message: the last few, or that there were none."""
    return " | ".join(log.errors[-_KEPT_MESSAGES:]) or "the builder gave no reason"
