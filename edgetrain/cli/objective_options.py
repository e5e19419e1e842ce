"""``--objective`` and what belongs to it: what a run learns from, for every command that trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetrain.errors import UsageError, near_matches

if TYPE_CHECKING:
    from torch import nn

    from edgetrain.memory import Guest
    from edgetrain.train import Objective
    from edgetrain.train.data import Loader, Source
    from edgetrain.train.data.groups import Order
    from edgetrain.train.run_record import ObjectiveRecord
    from edgetrain.train.teacher import Statistics, Teacher

ObjectiveName = Annotated[
    str,
    typer.Option("--objective", help="cross-entropy, distillation, attention-transfer, triplet or contrastive."),
]
LabelSmoothing = Annotated[float, typer.Option(min=0, max=1, help="Part of each target spread over all classes.")]
TeacherRun = Annotated[Path | None, typer.Option("--teacher", help="Directory of the run whose network teaches.")]
TeacherOutputs = Annotated[
    Path | None,
    typer.Option(help="Folder for the teacher's outputs: it runs once, before training; images are not augmented."),
]
Temperature = Annotated[float | None, typer.Option(help="That softens outputs; default 4.")]
Alpha = Annotated[
    float | None,
    typer.Option(help="Weight of softened outputs, 0 to 1; default 0.9, with attention transfer 0."),
]
Beta = Annotated[float | None, typer.Option(help="Weight of attention; default 1000.")]
AttentionMap = Annotated[
    str | None, typer.Option(help="Over the channels: sum or max, and the power of the activation; default sum2.")
]
Margin = Annotated[float | None, typer.Option(help="Default 0.2 for triplets, 1 for pairs.")]
Embedding = Annotated[int | None, typer.Option(min=1, help="Width of the output of a network that embeds; default 64.")]

EMBEDDING = 64
_OWN: dict[str, tuple[str, ...]] = {
    "cross-entropy": ("label_smoothing",),
    "distillation": ("label_smoothing", "teacher", "teacher_outputs", "temperature", "alpha"),
    "attention-transfer": (
        "label_smoothing",
        "teacher",
        "teacher_outputs",
        "temperature",
        "alpha",
        "beta",
        "attention_map",
    ),
    "triplet": ("margin", "embedding"),
    "contrastive": ("margin", "embedding"),
}
_GROUPS = {"triplet": 3, "contrastive": 2}
_REFERENCES = 2000


def objective_record(name: str = "cross-entropy", **options: Any) -> ObjectiveRecord:
    """The objective as ``run.json`` keeps it.

    Args:
        options: of the command line, under the names of the record; None, and a smoothing of 0, are not given.

    Raises:
        UsageError: no such objective, an option of another one, or one that is missing or out of range.
    """
    from pydantic import ValidationError

    from edgetrain.train.run_record import ObjectiveRecord

    if name not in _OWN:
        raise UsageError(
            found=f"--objective {name}", expected="one of " + ", ".join(_OWN), action=near_matches(name, list(_OWN))
        )
    given = {key: value for key, value in options.items() if value not in (None, 0.0) or key in ("alpha", "beta")}
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in _OWN[name]:
            users = [other for other, keys in _OWN.items() if key in keys]
            raise UsageError(
                found=f"--{key.replace('_', '-')} with --objective {name}",
                expected="an option of that objective",
                action=f"leave it out, or pass --objective {' or '.join(users)}",
            )
    if "teacher" in _OWN[name] and "teacher" not in given:
        raise UsageError(
            found=f"--objective {name} without a teacher",
            expected="the directory of a finished run",
            action="train one with edgetrain train --out DIR, and pass --teacher DIR",
        )
    for key in ("teacher", "teacher_outputs"):
        if key in given:
            given[key] = str(Path(given[key]).resolve())
    if name in _GROUPS:
        given.setdefault("embedding", EMBEDDING)
    try:
        return ObjectiveRecord.model_validate({"name": name, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]).replace("_", "-")
        raise UsageError(found=f"--{key} {first['input']}", expected=first["msg"], action=f"correct --{key}") from error


@dataclass(frozen=True)
class ObjectiveSetup:
    """An objective with all that a run must do for it.

    Attributes:
        make_model: makes the network that is trained, with taps where attention is looked at.
        guest: what shares the memory with a step.
        order: of the images; None: each once.
        augment: whether images are augmented.
        references: makes batches of labelled images by which embeddings are judged; None: none are needed.
    """

    objective: Objective
    make_model: Callable[[], nn.Module]
    guest: Guest
    order: Order | None
    augment: bool
    references: Callable[[], Loader] | None

    def start(self) -> None:
        """Once the data may be opened: gives an objective over embeddings its reference images."""
        from edgetrain.train import Contrastive, Triplet

        if isinstance(self.objective, Triplet | Contrastive):
            self.objective.references = self.references


def whole_groups(record: ObjectiveRecord, batch_size: int) -> int:
    """``batch_size`` rounded down to whole triplets or pairs."""
    group = _GROUPS.get(record.name, 1)
    return max(group, batch_size // group * group)


def order_of(record: ObjectiveRecord, source: Source) -> Order | None:
    """In which order the images come; None: each once.

    Raises:
        DataError: there is nothing to compare.
    """
    from edgetrain.train.data import Groups

    return Groups(source.labels, group=_GROUPS[record.name]) if record.name in _GROUPS else None


def set_up(
    record: ObjectiveRecord,
    *,
    make_model: Callable[[], nn.Module],
    source: Source,
    input_shape: tuple[int, int, int],
    batch_size: int,
    statistics: Statistics,
    seed: int,
    device: str,
    class_weights: tuple[float, ...] | None = None,
) -> ObjectiveSetup:
    """The objective of ``record`` for a network of ``make_model`` and the training images of ``source``.

    Args:
        class_weights: of the cross-entropy in it; None: all 1.

    Raises:
        StorageError: the teacher's run cannot be read.
        UsageError: it knows other classes or images.
    """
    from edgetrain.memory import Guest
    from edgetrain.train import Contrastive, CrossEntropy, TeacherObjective, Triplet

    hard = CrossEntropy(record.label_smoothing, class_weights)
    if record.name == "cross-entropy":
        return ObjectiveSetup(hard, make_model, Guest(), None, True, None)
    if record.name in _GROUPS:
        kind = Triplet if record.name == "triplet" else Contrastive
        objective: Any = kind() if record.margin is None else kind(record.margin)
        order = order_of(record, source)
        make = functools.partial(reference_loader, source, input_shape, statistics, seed)
        return ObjectiveSetup(objective, make_model, Guest(), order, True, make)
    attention = record.name == "attention-transfer"
    make_model, teacher = _taught(record, make_model, input_shape, statistics, source.classes, attention)
    guest = teacher.memory(input_shape=input_shape, batch_size=batch_size, device="cuda" if device == "cuda" else "cpu")
    answering: Any = teacher
    if record.teacher_outputs is not None:
        answering = _stored(record, teacher, source, input_shape, statistics, seed, device)
        guest = answering.guest(batch_size)
    default = 0.0 if attention else 0.9
    objective = TeacherObjective(
        answering,
        temperature=record.temperature,
        alpha=default if record.alpha is None else record.alpha,
        beta=(1e3 if record.beta is None else record.beta) if attention else 0.0,
        hard=hard,
    )
    return ObjectiveSetup(objective, make_model, guest, None, record.teacher_outputs is None, None)


def _taught(
    record: ObjectiveRecord,
    make_model: Callable[[], nn.Module],
    input_shape: tuple[int, int, int],
    statistics: Statistics,
    classes: tuple[str, ...],
    attention: bool,
) -> tuple[Callable[[], nn.Module], Teacher]:
    """The student's maker, and the teacher."""
    import torch

    from edgetrain.train import Teacher, tapped_student
    from edgetrain.train.run_record import RunRecord

    assert record.teacher is not None
    own = RunRecord.read(Path(record.teacher))
    if own.classes != tuple(classes) or own.embedding is not None or own.input_shape != input_shape:
        raise UsageError(
            found=f"a teacher of {_described(own)}",
            expected=f"one of images {'x'.join(map(str, input_shape))} and the classes {', '.join(classes)}",
            action="train it on the same data, with the same --image-size",
        )
    mapping, power = record.mapping
    groups: Any = ()
    if attention:
        tapped = functools.partial(tapped_student, make_model, input_shape=input_shape, mapping=mapping, power=power)
        with torch.random.fork_rng():
            groups = tapped().groups
        make_model = tapped
    teacher = Teacher(
        functools.partial(_load, Path(record.teacher)),
        groups=groups,
        mapping=mapping,
        power=power,
        student_statistics=statistics,
        own_statistics=(own.mean, own.std),
    )
    return make_model, teacher


def _stored(
    record: ObjectiveRecord,
    teacher: Teacher,
    source: Source,
    input_shape: tuple[int, int, int],
    statistics: Statistics,
    seed: int,
    device: str,
) -> Any:
    """The teacher's stored answers, which are made where there are none."""
    from edgetrain.targets import release_free_memory
    from edgetrain.train.stored_answers import question_digest, stored_answers

    assert record.teacher_outputs is not None
    preprocessing = {
        "input_shape": input_shape,
        "statistics": statistics,
        "groups": [group.size for group in teacher.groups],
        "attention_map": record.attention_map,
    }
    found = stored_answers(
        teacher,
        functools.partial(plain_loader, source, input_shape, statistics, seed),
        digest=question_digest(teacher.make(), source, preprocessing),
        folder=Path(record.teacher_outputs),
        device=device,
    )
    teacher.forget()
    release_free_memory()
    return found


def reference_loader(source: Source, input_shape: tuple[int, int, int], statistics: Statistics, seed: int) -> Loader:
    """At most 2000 images of ``source``, each class in proportion, by which embeddings are judged."""
    from edgetrain.train.data.subset import limited

    return plain_loader(limited(source, _REFERENCES, seed=seed), input_shape, statistics, seed)


def plain_loader(
    source: Source,
    input_shape: tuple[int, int, int],
    statistics: Statistics,
    seed: int,
    *,
    batch_size: int | None = None,
) -> Loader:
    """All images of ``source`` as they are, in order; None: as many at once as a test batch has at most."""
    from edgetrain.train.data import Loader
    from edgetrain.train.trial import EVALUATION_BATCH_SIZE

    return Loader(
        source,
        batch_size=min(batch_size or EVALUATION_BATCH_SIZE, len(source)),
        image_size=input_shape,
        augment=False,
        shuffle=False,
        seed=seed,
        drop_last=False,
        mean=statistics[0],
        std=statistics[1],
    )


def _load(run_dir: Path) -> nn.Module:
    """The network of a run; finds it by its directory, so that it can be called in another process."""
    from edgetrain.cli.trained import load_run

    return load_run(run_dir).model


def _described(record: Any) -> str:
    what = f"embeddings of {record.embedding}" if record.embedding else f"the classes {', '.join(record.classes)}"
    return f"images {'x'.join(map(str, record.input_shape))} and {what}"
