"""A training run of an exported step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrain.array_file import ArrayFile
from edgetrain.errors import DataError, ExportError, StorageError, TrainingError
from edgetrain.files import file_sha256, write_atomically
from edgetrain.lite.runtime import Session, return_large_blocks
from edgetrain.lite.state import GRADIENT, LAST, PREVIOUS, read_arrays, read_manifest, restore, save
from edgetrain.train.data import ArrayLoader, Source, open_source
from edgetrain.train.records import EpochRecord, Position
from edgetrain.train.schedule import triangular_rate
from edgetrain.train.stopping import InterruptedRunError, Stop

Array = npt.NDArray[Any]
Arrays = tuple[npt.ArrayLike, npt.ArrayLike]


def load(folder: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None) -> LiteRun:
    """The exported step in ``folder``.

    Args:
        threads: of ONNX Runtime; None: one per core.
        providers: execution providers of ONNX Runtime in the order of preference; None: TensorRT and CUDA where they
            are installed, then the CPU.

    Raises:
        StorageError: a file is missing, damaged, or of another export.
    """
    return LiteRun(Path(folder), threads=threads, providers=providers)


class LiteRun:
    """An exported step with its state.

    The state is changed in place while a step runs. A step that fails leaves it half changed: go on from a checkpoint.

    Attributes:
        manifest: what the export says of itself.
        state: arrays by the names that they have in a checkpoint.
        history: a record per epoch done.
    """

    def __init__(self, folder: Path, *, threads: int | None, providers: Sequence[str] | None) -> None:
        return_large_blocks()
        self.folder, self.manifest = folder, read_manifest(folder)
        self._options: dict[str, Any] = {"threads": threads, "providers": providers}
        for name, digest in self._digests():
            if not (folder / name).is_file() or file_sha256(folder / name) != digest:
                raise StorageError(
                    found=f"{folder / name} is missing or not the one that was exported",
                    expected=f"a file with the SHA-256 {digest}",
                    action="copy the whole directory again, or export the run again",
                )
        file = ArrayFile(folder / self.manifest["state"]["file"])
        self.state = read_arrays(file, file.names(""))
        for name, shape in self.manifest["zeros"].items():
            self.state[name] = np.zeros(shape, np.float32)
        self.history: list[EpochRecord] = []
        self._position = Position()
        self._sessions: dict[str, Session] = {}

    def fit(
        self,
        data: str | Path | Source | Arrays,
        test_data: str | Path | Source | Arrays | None = None,
        *,
        epochs: int | None = None,
        learning_rate: float | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        augment: bool = True,
        limit_train: int | None = None,
        on_step: Any = None,
    ) -> list[EpochRecord]:
        """Trains, and gives a record per epoch.

        Args:
            data: a path as ``edgetrain train --data`` takes it; or (images, labels), as
                :class:`edgetrain.train.data.arrays.ArraySource` takes them.
            test_data: likewise; None: the test split of ``data`` where it is a path that has one.
            epochs: None: those of the export.
            learning_rate: highest one; None: that of the export.
            run_dir: gets ``metrics.jsonl`` and ``checkpoints/``; None: nothing is written.
            resume: go on from the newest good checkpoint in ``run_dir``.
            augment: crop, mirror and cut out.
            on_step: called with (step of the epoch, steps per epoch, loss).

        Raises:
            DataError: the data have other classes, or fewer images than a batch.
            TrainingError: the loss is not a number.
            InterruptedRunError: Ctrl-C or SIGTERM, after the step and a checkpoint.
        """
        epochs = self.manifest["epochs"] if epochs is None else epochs
        peak = self.manifest["peak_rate"] if learning_rate is None else learning_rate
        loader, test = self._loaders(data, test_data, augment=augment, limit=limit_train)
        checkpoint = None if run_dir is None else Path(run_dir) / "checkpoints" / LAST
        if checkpoint is not None:
            self._begin(checkpoint, resume=resume)
        with Stop() as stop:
            while self._position.epoch < epochs:
                self._epoch(loader, stop, checkpoint, total=epochs * len(loader), peak=peak, on_step=on_step)
                position = self._position
                accuracy = None if test is None else self._accuracy(test)
                self.history.append(_record(position, accuracy))
                self._position = position.after_epoch()
                self._save(checkpoint)
                if stop.asked is not None and self._position.epoch < epochs:
                    raise InterruptedRunError(checkpoint or Path(), stop.asked)
        return self.history

    def step(self, images: Array, labels: Array, rate: float) -> tuple[float, int]:
        """One training step: loss and number of correct answers before it.

        Args:
            images: (n, c, h, w) float32, normalised, n being the exported batch size.
            labels: (n,) int64.
        """
        parts = self.manifest["micro_batches"]
        scalars = {"learning_rate": np.array(rate, np.float32), "step": np.array(self._position.step + 1, np.float32)}
        if parts == 1:
            found = self._run("train_step.onnx", {"images": images, "labels": labels, **scalars})
        else:
            for name, array in self.state.items():
                if name.startswith(GRADIENT):
                    array.fill(0)
            found = (0.0, 0)
            for some, truth in zip(np.split(images, parts), np.split(labels, parts), strict=True):
                loss, correct = self._run("accumulate.onnx", {"images": some, "labels": truth})
                found = found[0] + loss, found[1] + correct
            self._run("update.onnx", scalars)
        self._position.step += 1
        return found

    def logits(self, images: Array) -> Array:
        """What the network says to images (n, c, h, w), normalised; n is at most that of the graph."""
        session = self._session("eval.onnx")
        shape, dtype = session.inputs["images"]
        padded = np.zeros(shape, dtype)
        padded[: len(images)] = images
        logits = np.empty(*session.outputs["logits"])
        session.run({"images": padded, **self.state}, {"logits": logits})
        return logits[: len(images)]

    def export(self, path: str | Path) -> float:
        """Writes the folded inference model of the state to ``path``: pixels 0..1 in, logits out.

        Returns:
            The largest difference of a logit from those of the state, relative to the largest.

        Raises:
            ExportError: the folds of this network could not be exported, or the state holds what is no number.
        """
        from edgetrain.lite.inference import write_inference

        about = self.manifest.get("inference", {"refused": "it was exported by an earlier release"})
        if "refused" in about:
            raise ExportError(
                found=f"{self.folder} has no inference model: {about['refused']}",
                expected="an export with one",
                action="export the run again; or load the checkpoint where PyTorch is, and export from there",
            )
        return write_inference(self, self._session("fold.onnx"), Path(path))

    def restore(self, run_dir: str | Path) -> None:
        """Takes the state of the newest good checkpoint in ``run_dir``.

        Raises:
            StorageError: there is none, or it is of another network.
        """
        self._position, self.history = restore(Path(run_dir) / "checkpoints", self.state)

    def evaluate(self, data: str | Path | Source | Arrays, *, split: Any = "test") -> float:
        """Accuracy on ``data``, 0..1."""
        return self._accuracy(self._loader(self._source(data, split), training=False))

    def _epoch(
        self, loader: ArrayLoader, stop: Stop, checkpoint: Path | None, *, total: int, peak: float, on_step: Any
    ) -> None:
        position = self._position
        loader.set_epoch(position.epoch + 1)
        began = time.perf_counter() - position.seconds
        for images, labels in loader.iterate(position.batch):
            if len(labels) == self.manifest["batch_size"]:  # one with a broken image is smaller
                rate = triangular_rate(position.step, total, peak=peak, warmup=self.manifest["warmup"])
                loss, correct = self.step(images, np.ascontiguousarray(labels), rate)
                if not math.isfinite(loss):
                    raise TrainingError(
                        found=f"the loss is {loss} at step {position.step} (epoch {position.epoch + 1})",
                        expected="a finite loss",
                        action="lower the learning rate; the last checkpoint is from before this epoch",
                    )
                position.seen += len(labels)
                position.correct += correct
                position.loss_sum += loss * len(labels)
            position.batch = loader.done
            position.seconds = time.perf_counter() - began
            if on_step is not None:
                on_step(position.batch, len(loader), position.loss_sum / max(1, position.seen))
            if stop.asked is not None:
                self._save(checkpoint)
                raise InterruptedRunError(checkpoint or Path(), stop.asked)

    def _run(self, file: str, given: dict[str, Array]) -> tuple[float, int]:
        session = self._session(file)
        loss, correct = np.zeros((), np.float32), np.zeros((), np.int64)
        outputs: dict[str, Array] = {"loss": loss, "correct": correct}
        outputs |= {f"new.{name}": self.state[name] for name in self.manifest["graphs"][file]["writes"]}
        session.run({**self.state, **given}, outputs)
        return float(loss), int(correct)

    def _session(self, file: str) -> Session:
        if file not in self._sessions:
            self._sessions[file] = Session(self.folder / file, **self._options)
        return self._sessions[file]

    def _accuracy(self, loader: ArrayLoader) -> float:
        correct = seen = 0
        for images, labels in loader:
            correct += int((self.logits(images).argmax(1) == labels).sum())
            seen += len(labels)
        return correct / max(1, seen)

    def _loaders(self, data: Any, test_data: Any, *, augment: bool, limit: int | None) -> tuple[Any, Any]:
        train = self._loader(self._source(data, "train", limit), training=True, augment=augment)
        if test_data is not None:
            return train, self._loader(self._source(test_data, "test"), training=False)
        if not isinstance(data, (str, Path)):
            return train, None
        try:
            return train, self._loader(self._source(data, "test"), training=False)
        except DataError as error:
            if not error.found.endswith("has no test split"):
                raise
            return train, None

    def _source(self, data: Any, split: Any, limit: int | None = None) -> Source:
        if isinstance(data, (str, Path)):
            source = open_source(data, split=split, limit=limit, seed=self.manifest["seed"])
        elif isinstance(data, tuple):
            from edgetrain.train.data.arrays import ArraySource

            source = ArraySource(*data, classes=tuple(self.manifest["classes"]))
        else:
            source = data
        if len(source.classes) != len(self.manifest["classes"]):
            raise DataError(
                found=f"{source.name} has {len(source.classes)} classes",
                expected=f"{len(self.manifest['classes'])}, for which the step was exported",
                action="name data of the same classes, or export a run on these",
            )
        return source

    def _loader(self, source: Source, *, training: bool, augment: bool = False) -> ArrayLoader:
        manifest = self.manifest
        size = manifest["batch_size"] if training else manifest["batch_size"] // manifest["micro_batches"]
        channels, height, width = manifest["input_shape"]
        return ArrayLoader(
            source,
            batch_size=size,
            image_size=(channels, height, width),
            augment=training and augment,
            shuffle=training,
            seed=manifest["seed"],
            drop_last=training,
            mean=manifest["mean"],
            std=manifest["std"],
        )

    def _begin(self, checkpoint: Path, *, resume: bool) -> None:
        if resume:
            self.restore(checkpoint.parent.parent)
            return
        for name in (LAST, PREVIOUS):
            checkpoint.with_name(name).unlink(missing_ok=True)
        self._save(checkpoint)

    def _save(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        save(checkpoint, self.state, self._position, self.history)
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in self.history)
        write_atomically(checkpoint.parent.parent / "metrics.jsonl", lines.encode())

    def _digests(self) -> Iterable[tuple[str, str]]:
        inference = self.manifest.get("inference", {})
        if "file" in inference:
            yield inference["file"], inference["sha256"]
        yield self.manifest["state"]["file"], self.manifest["state"]["sha256"]
        yield from ((name, graph["sha256"]) for name, graph in self.manifest["graphs"].items())


def _record(position: Position, accuracy: float | None) -> EpochRecord:
    seen = max(position.seen, 1)
    rate = position.seen / position.seconds if position.seconds else 0.0
    return EpochRecord(
        position.epoch + 1, position.loss_sum / seen, position.correct / seen, accuracy, rate, position.seconds
    )
