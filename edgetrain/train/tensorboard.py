"""A run as TensorBoard event files, written by the tensorboard package (extra ``tensorboard``).

    train/loss, train/accuracy, train/learning_rate, train/images_per_second     per step
    memory/peak_MiB, memory/budget_MiB                                           per step, where they are known
    epoch/loss, epoch/accuracy, epoch/test_accuracy                              per epoch, at its last step

Steps count on through the epochs. A run that goes on says so in the file (a session start, which TensorBoard's readers
take as the end of everything from that step on), so what was written after the last checkpoint is not shown twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgetrain.errors import MissingExtraError, StorageError
from edgetrain.train.callbacks import Callback
from edgetrain.train.records import EpochRecord, StepRecord
from edgetrain.units import MIB

if TYPE_CHECKING:
    from edgetrain.targets import Target

_QUEUE = 64  # events that wait to be written


class TensorBoard(Callback):
    """Writes the news of a run to ``folder``; closed as a context manager, and flushed at every checkpoint.

    Args:
        peak_bytes: gives the highest memory so far.
        budget_bytes: what it must stay below.

    Raises:
        MissingExtraError: the tensorboard package is not installed.
    """

    def __init__(
        self, folder: str | Path, *, peak_bytes: Callable[[], int] | None = None, budget_bytes: int | None = None
    ) -> None:
        _package()
        self._folder = Path(folder)
        self._peak_bytes, self._budget_bytes = peak_bytes, budget_bytes
        self._step = 0
        self._writer: Any = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Writes what waits and ends the writer's thread."""
        if self._writer is not None:
            with self._storing():
                self._writer.close()
            self._writer = None

    def on_start(self, step: int) -> None:
        writer, events, _ = _package()
        self.close()
        self._step = step
        with self._storing():
            self._writer = writer.EventFileWriter(str(self._folder), max_queue_size=_QUEUE)
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(events.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def on_step(self, record: StepRecord) -> None:
        self._step = (record.epoch - 1) * record.steps + record.step
        values = {
            "train/loss": record.loss,
            "train/accuracy": record.accuracy,
            "train/learning_rate": record.learning_rate,
            "train/images_per_second": record.images_per_second,
        }
        if self._peak_bytes is not None:
            values["memory/peak_MiB"] = self._peak_bytes() / MIB
        if self._budget_bytes is not None:
            values["memory/budget_MiB"] = self._budget_bytes / MIB
        self._write(values)

    def on_epoch(self, record: EpochRecord) -> None:
        values = {"epoch/loss": record.loss, "epoch/accuracy": record.accuracy}
        if record.test_accuracy is not None:
            values["epoch/test_accuracy"] = record.test_accuracy
        self._write(values)

    def on_checkpoint(self, path: Path) -> None:
        if self._writer is not None:
            with self._storing():
                self._writer.flush()

    def _write(self, values: dict[str, float]) -> None:
        _, events, summaries = _package()
        summary = summaries.Summary(
            value=[summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        with self._storing():
            self._writer.add_event(events.Event(wall_time=time.time(), step=self._step, summary=summary))

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                found=f"{self._folder} could not be written: {error.strerror or error}",
                expected="free, writable disk",
                action="free some space, then go on with edgetrain resume; the checkpoints are intact",
            ) from error


def with_tensorboard(
    watch: Callable[[Target], contextlib.AbstractContextManager[Sequence[Callback]]],
    folder: Path,
    *,
    budget_bytes: int | None,
) -> Callable[[Target], contextlib.AbstractContextManager[Sequence[Callback]]]:
    """``watch`` of :func:`edgetrain.train.capped.train_capped`, with a :class:`TensorBoard` among its callbacks."""
    _package()  # refused, and loaded, before anything is counted

    @contextlib.contextmanager
    def watching(target: Target) -> Iterator[Sequence[Callback]]:
        board = TensorBoard(folder, peak_bytes=target.peak_bytes, budget_bytes=budget_bytes)
        with watch(target) as callbacks, board:
            yield (*callbacks, board)

    return watching


def _package() -> tuple[Any, Any, Any]:
    """The modules of tensorboard with the writer, events and summaries."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import event_file_writer
    except ImportError as error:
        raise MissingExtraError(
            found="the package tensorboard is not installed",
            expected="it for event files",
            action="run pip install 'edgetrain[tensorboard]'",
        ) from error
    return event_file_writer, event_pb2, summary_pb2
