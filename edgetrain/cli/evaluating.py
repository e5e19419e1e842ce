"""What ``edgetrain eval`` does, as a value: a run directory and images to a confusion matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from edgetrain.cli.finetune_text import class_table, print_wide
from edgetrain.cli.objective_options import plain_loader, reference_loader
from edgetrain.cli.trained import TrainedRun, load_run, run_source
from edgetrain.errors import BudgetError, DataError, ModelError
from edgetrain.planner import Plan
from edgetrain.targets import select_target
from edgetrain.train.data import Source, Split, open_source
from edgetrain.train.data.folder import is_undivided, open_undivided
from edgetrain.train.data.subset import limited
from edgetrain.train.embeddings import centroid_predictions
from edgetrain.train.evaluation import predictions
from edgetrain.train.metrics import Confusion
from edgetrain.train.run_record import RunRecord
from edgetrain.train.trial import EVALUATION_BATCH_SIZE

_Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """How a network did.

    Attributes:
        run: its directory.
        trained: the network, and the checkpoint that it is from.
        data: name of the images; ``split``: ``test``, ``train``, or ``all`` of a folder that is not divided.
        broken: (path, reason) of the images that were left out.
    """

    run: Path
    trained: TrainedRun
    data: str
    split: str
    broken: tuple[tuple[str, str], ...]
    confusion: Confusion

    @property
    def images(self) -> int:
        """How many were looked at."""
        return sum(map(sum, self.confusion.counts))

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        record = self.trained.record
        return {
            "run": str(self.run),
            "checkpoint": str(self.trained.checkpoint),
            "epoch": self.trained.epoch,
            "step": self.trained.step,
            "model": record.model,
            "embedding": record.embedding,
            "data": self.data,
            "split": self.split,
            "images": self.images,
            "broken_images": [{"path": path, "reason": reason} for path, reason in self.broken],
            "classes": list(record.classes),
            "input_shape": list(record.input_shape),
            **self.confusion.to_dict(),
        }


def evaluate_run(
    run: Path, *, data: str | None = None, split: str | None = None, limit: int | None = None, batch_size: int | None
) -> Evaluation:
    """Evaluates the newest good checkpoint of ``run``; the options as of ``edgetrain eval``.

    The images are brought to the input of the network, and normalised as those it was trained on. An embedding has the
    class of the nearest centroid, as in training: of at most 2000 training images of the run.

    Raises:
        BudgetError: memory ran out.
        DataError: the images cannot be used, or are of other classes.
        StorageError: the run cannot be read.
    """
    trained = load_run(run)
    record = trained.record
    source, used = _images(record, data, split, limit)
    order = label_order(source.classes, record.classes, name=source.name)
    size = batch_size or min(_planned_batch(run), EVALUATION_BATCH_SIZE)
    statistics = (record.mean, record.std)
    loader = plain_loader(source, record.input_shape, statistics, record.seed, batch_size=size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches: _Batches = ((images, order[labels]) for images, labels in loader)
    model = trained.model.to(device)
    predict = functools.partial(predictions, model)
    if record.embedding is not None:
        references = reference_loader(_references(record), record.input_shape, statistics, record.seed)
        predict = functools.partial(centroid_predictions, model, references)
    try:
        found = Confusion.of(record.classes, _known(predict(batches, device=device), len(record.classes)))
    except Exception as error:
        if not select_target(device).is_out_of_memory(error):
            raise
        raise BudgetError(
            found=f"no memory left for {size} images of {'x'.join(map(str, record.input_shape))} at once",
            expected="room for their activations",
            action=f"pass --batch-size {max(1, size // 2)}" if size > 1 else "end other programs",
        ) from error
    return Evaluation(run, trained, source.name, used, tuple(loader.broken), found)


def label_order(given: Sequence[str], known: Sequence[str], *, name: str) -> Tensor:
    """For each class of the images its place among those of the network, (k,).

    Raises:
        DataError: one has classes that the other has not.
    """
    if set(given) != set(known):
        unknown, missing = ([c for c in one if c not in other] for one, other in ((given, known), (known, given)))
        parts = [("classes that the network does not know: ", unknown), ("no images of: ", missing)]
        raise DataError(
            found=f"{name} with " + "; ".join(text + _listed(names) for text, names in parts if names),
            expected=f"the {len(known)} classes of the run: {_listed(known)}",
            action="name other --data, or adapt the network to these with edgetrain finetune",
        )
    return torch.tensor([list(known).index(c) for c in given])


def show(result: Evaluation) -> None:
    """Prints ``result`` for people."""
    record, found = result.trained.record, result.confusion
    judged = "" if record.embedding is None else f", embeddings of {record.embedding} by nearest centroid"
    which = "all images" if result.split == "all" else f"{result.split} split"
    print_wide(
        f"{record.model} of {result.run} after epoch {result.trained.epoch}, step {result.trained.step}{judged}",
        f"{result.images} images of {result.data}, {which}",
        class_table(found),
        f"accuracy {found.accuracy:.2%}, macro-F1 {found.macro_f1:.2%}",
    )
    if result.broken:
        print_wide(f"left out {len(result.broken)} broken images: " + _listed([path for path, _ in result.broken]))


def _images(record: RunRecord, data: str | None, split: str | None, limit: int | None) -> tuple[Source, str]:
    """The images and what of the data they are."""
    chosen = cast(Split, split or "test")
    own = data is None or (data if data == "digits" else str(Path(data).resolve())) == record.data
    if data is not None and not own and split is None and is_undivided(Path(data)):
        return limited(open_undivided(Path(data)), limit, seed=record.seed), "all"
    try:
        if own:
            return run_source(record, chosen, limit=limit or _own_limit(record, chosen)), chosen
        return open_source(cast(str, data), split=chosen, limit=limit, seed=record.seed), chosen
    except DataError as error:
        if chosen == "test" and error.found.endswith("has no test split"):
            action = f"{error.action}; or pass --split train"
            raise DataError(found=error.found, expected=error.expected, action=action) from error
        raise


def _own_limit(record: RunRecord, split: Split) -> int | None:
    training = record.training
    if training is None:
        return None
    return training.limit_test if split == "test" else training.limit_train


def _references(record: RunRecord) -> Source:
    try:
        return run_source(record, "train", limit=_own_limit(record, "train"))
    except DataError as error:
        raise DataError(
            found=f"a run that embeds, without its training images ({error.found})",
            expected="them, as an embedding has the class whose mean over training images is nearest",
            action=f"put them back at {record.data}",
        ) from error


def _planned_batch(run: Path) -> int:
    """Images of a step; of a run without a plan, the most of a test batch."""
    path = run / "plan.json"
    return Plan.read(path).input_shape[0] if path.exists() else EVALUATION_BATCH_SIZE


def _known(pairs: _Batches, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``pairs`` as they are; raises ModelError where the network has an output for no class."""
    for predicted, labels in pairs:
        if len(predicted) and int(predicted.max()) >= classes:
            raise ModelError(
                found=f"a network that gives class {int(predicted.max())}",
                expected=f"one of {classes} logits, a class for each",
                action="train again: run.json was changed, or belongs to another run",
            )
        yield predicted, labels


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
