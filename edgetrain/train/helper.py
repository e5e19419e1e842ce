"""Work done in a process that has done nothing else, so that it leaves nothing in this one.

A process that has worked is not what it was: its heap holds free what the work took, and serves from there what a cap
should count; oneDNN has its kernels already. So a helper is started that only imports torch, and is forked (before it
has any thread of OpenMP) for each piece of work. Every fork has a helper of its own, forked once more, for the work
that it wants done likewise.

Where this process ends, or no longer wants to know, the pipe to the helper is closed; the helper ends its fork and
itself. Work and values are pickled: both ends of the pipe are this program.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import IO, TypeVar

import torch

from edgetrain.errors import EdgetrainError
from edgetrain.models import create_model
from edgetrain.planner import uniform_plan
from edgetrain.train.recipe import Recipe

T = TypeVar("T")

_LENGTH_BYTES = 8
_STOPPED = b""
"""In place of an answer: the fork ended without one."""


class NoHelperError(Exception):
    """There is no process that could do it, or the work failed there: do it here."""


class HelperDiedError(Exception):
    """The process ended without an answer; a failed allocation can do that inside oneDNN or OpenMP."""


class Helper:
    """A process that does work, started when it is first asked; a context, at whose end it is gone.

    Args:
        pipes: to one that is there already, requests and answers.
    """

    def __init__(self, pipes: tuple[IO[bytes], IO[bytes]] | None = None) -> None:
        self._pipes = pipes
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Helper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes or ():
            with contextlib.suppress(OSError):  # a request that was not read any more
                pipe.close()
        self._pipes = None
        if self._process is not None:
            self._process.wait()
            self._process = None

    def ask(self, work: Callable[[Helper], T]) -> T:
        """What ``work`` gives for a helper of its own.

        Args:
            work: it can be pickled, and so can what it gives.

        Raises:
            EdgetrainError: ``work`` raised it.
            HelperDiedError: its process ended.
            NoHelperError: it cannot be asked, or raised something else.
        """
        if not hasattr(os, "fork"):
            raise NoHelperError
        try:
            request = pickle.dumps((sys.path, os.getcwd(), _settings(), pickle.dumps(work)))
            requests, answers = self._pipes or self._start()
            _send(requests, request)
            answer = _receive(answers)
        except (OSError, AttributeError, TypeError, pickle.PicklingError) as error:
            raise NoHelperError from error
        if answer is None:
            raise NoHelperError
        if answer == _STOPPED:
            raise HelperDiedError
        value, refused = pickle.loads(answer)
        if isinstance(refused, EdgetrainError):
            raise refused
        if refused is not None:
            raise NoHelperError(refused)
        found: T = value
        return found

    def _start(self) -> tuple[IO[bytes], IO[bytes]]:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from edgetrain.train.helper import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = self._process.stdin, self._process.stdout
        return self._pipes


def _settings() -> tuple[int, torch.dtype, bool]:
    return torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()


def _set(threads: int, dtype: torch.dtype, deterministic: bool) -> None:
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


def serve() -> None:
    """The helper's process: requests from stdin, answers to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks: it closes the pipe
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # the user's model may print
    # loads what a plan and an optimiser need, once for all forks; so few elements that no thread of OpenMP is started
    model = create_model("hybrid18", width=8)
    uniform_plan(model, "invert_layerwise", input_shape=(3, 16, 16), batch_size=2)
    Recipe().optimizer(model.parameters())
    importlib.import_module("edgetrain.train.capped")
    _serve(requests, answers)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    while (request := _receive(requests)) is not None:
        answer = _in_fork(request, requests, answers)
        if answer is None:
            return
        _send(answers, answer)


def _in_fork(request: bytes, requests: IO[bytes], answers: IO[bytes]) -> bytes | None:
    """The answer of a fork, empty where it ended without one; None where nobody waits for it any more."""
    result, own = os.pipe()
    child = os.fork()
    if child == 0:
        with _ending():
            os.close(requests.fileno())
            os.close(answers.fileno())
            os.close(result)
            answer = _answer(request, own)
            with os.fdopen(own, "wb") as file:
                _send(file, answer)
    os.close(own)
    found = io.BytesIO()
    looking = select.poll()
    looking.register(result, select.POLLIN)
    looking.register(requests.fileno(), 0)  # tells only that its other end was closed
    try:
        while True:
            if any(ready == requests.fileno() for ready, _ in looking.poll()):
                os.kill(child, signal.SIGKILL)
                return None
            part = os.read(result, io.DEFAULT_BUFFER_SIZE)
            found.write(part)
            # not only at the end of the file: a process that the work has started may hold it open
            message = _receive(io.BytesIO(found.getvalue()))
            if message is not None or not part:
                break
    finally:
        os.close(result)
        status = os.waitpid(child, 0)[1]
    return message if message is not None and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else _STOPPED


def _answer(request: bytes, own: int) -> bytes:
    """Does the work, pickles ``(value, None)`` or ``(None, what it raised)``."""
    sys.path[:], folder, settings, packed = pickle.loads(request)
    os.chdir(folder)
    with _forked(own) as helper:
        _set(*settings)
        try:
            return pickle.dumps((pickle.loads(packed)(helper), None))
        except EdgetrainError as error:
            return pickle.dumps((None, error))
        except Exception as error:  # it may not survive pickling, and is raised again by the one who asks
            return pickle.dumps((None, repr(error)))


@contextlib.contextmanager
def _forked(own: int) -> Iterator[Helper]:
    """A helper that is a fork of this process as it is now; ``own`` is what it must not keep open."""
    (there, requests), (answers, back) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with _ending():
            for file in (requests, answers, own):
                os.close(file)
            _serve(os.fdopen(there, "rb"), os.fdopen(back, "wb"))
    os.close(there)
    os.close(back)
    try:
        with Helper((os.fdopen(requests, "wb"), os.fdopen(answers, "rb"))) as helper:
            yield helper
    finally:
        os.waitpid(child, 0)


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """At its end the process is gone, without what a program does at its end."""
    code = 1
    try:
        yield
        code = 0
    finally:
        os._exit(code)


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(_LENGTH_BYTES, "little") + message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes | None:
    """The next message; None where there will be none."""
    length = pipe.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        return None
    size = int.from_bytes(length, "little")
    message = pipe.read(size)
    return message if len(message) == size else None
