"""Losses of a teacher against their definitions; runs that learn from one."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import edgetrain
from edgetrain.chain import Tapped, chain_of, groups_of
from edgetrain.errors import ModelError, UsageError
from edgetrain.nn.attention import attention_map, normalised_maps
from edgetrain.train import CrossEntropy, Recipe, Teacher, TeacherObjective, Trainer, tapped_student
from edgetrain.train.data import Loader, open_source
from edgetrain.train.distillation import Answers, softened_loss
from edgetrain.train.stored_answers import StoredAnswers, question_digest, store_answers
from edgetrain.train.teacher import paired

SHAPE = (3, 16, 16)


def teacher_network() -> nn.Module:
    torch.manual_seed(3)
    return edgetrain.create_model("wrn-16-2", width=4)


def student_network() -> nn.Module:
    torch.manual_seed(4)
    return edgetrain.create_model("hybrid18", width=4)


def images(count: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(count, *SHAPE), torch.randint(0, 10, (count,))


class Fixed:
    """A teacher with given answers."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def __call__(self, images: Tensor, indices: Tensor | None) -> Answers:
        return self.answers


def test_softened_loss_is_the_cross_entropy_of_softened_distributions_less_their_own() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    expected = 16 * ((p * p.log()).sum(1) - (p * q.log()).sum(1)).mean()
    torch.testing.assert_close(softened_loss(student, teacher, 4.0), expected)


def test_distillation_weighs_it_against_the_labels() -> None:
    logits, labels = torch.randn(6, 10), torch.randint(0, 10, (6,))
    teacher = torch.randn(6, 10)
    objective = TeacherObjective(Fixed(Answers(teacher)), hard=CrossEntropy(0.1))
    objective.prepare(torch.zeros(6, *SHAPE), None, nn.Identity())
    expected = 0.1 * F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.9 * softened_loss(logits, teacher, 4.0)
    torch.testing.assert_close(objective(logits, labels), expected)


def test_a_teacher_runs_in_evaluation_mode_in_parts_and_is_not_changed() -> None:
    network = teacher_network()
    network(torch.randn(4, *SHAPE))  # running statistics of its own
    before = copy.deepcopy(network.state_dict())
    x, _ = images()
    whole = Teacher(lambda: network)(x)
    parts = Teacher(lambda: network, samples=3)(x)
    torch.testing.assert_close(whole.logits, copy.deepcopy(network).eval()(x))
    torch.testing.assert_close(parts.logits, whole.logits)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not whole.logits.requires_grad


def test_a_teacher_sees_images_by_its_own_normalisation() -> None:
    own, others = ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1]), ([0.1, 0.2, 0.3], [0.3, 0.2, 0.2])
    raw = torch.rand(2, *SHAPE)

    def normalised(by: tuple[list[float], list[float]]) -> Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in by)
        return (raw - mean) / std

    network = teacher_network().eval()
    teacher = Teacher(lambda: network, student_statistics=others, own_statistics=own)
    torch.testing.assert_close(teacher(normalised(others)).logits, network(normalised(own)), rtol=1e-4, atol=1e-4)


def test_each_group_of_the_student_has_the_teachers_of_the_nearest_resolution() -> None:
    student = groups_of(chain_of(student_network()), (3, 32, 32))
    teacher = groups_of(chain_of(teacher_network()), (3, 32, 32))
    assert [(a.size, b.size) for a, b in paired(student, teacher)] == [((s, s), (s, s)) for s in (32, 16, 8)]


def test_the_targets_are_the_teachers_maps_in_the_students_size() -> None:
    student = tapped_student(student_network, input_shape=SHAPE)
    network = teacher_network().eval()
    x, _ = images()
    targets = Teacher(lambda: network, groups=student.groups)(x).targets
    blocks, z = chain_of(network), x
    for i, block in enumerate(blocks.blocks):
        z = block.module(z)
        if i == groups_of(blocks, SHAPE)[1].last:
            expected = normalised_maps(attention_map(z.detach()), student.groups[1].size)
    torch.testing.assert_close(targets[1], expected)


def run(tmp_path: Path, objective: TeacherObjective, student: nn.Module, *, mode: str = "invert_layerwise") -> Trainer:
    plan = edgetrain.uniform_plan(student, mode, input_shape=SHAPE, batch_size=8)  # type: ignore[arg-type]
    torch.manual_seed(0)
    trainer = Trainer(
        student, plan, run_dir=tmp_path, recipe=Recipe(epochs=2, batch_size=8, peak_rate=0.02), objective=objective
    )
    x, labels = images(16)
    trainer.fit(DataLoader(TensorDataset(x, labels), batch_size=8), [(x, labels)])
    return trainer


@pytest.mark.parametrize("beta", [0.0, 1e3])
def test_a_run_learns_the_same_in_every_mode(tmp_path: Path, beta: float) -> None:
    weights = []
    for mode in ("keep_all", "invert_layerwise"):
        student: nn.Module = student_network()
        groups = ()
        if beta:
            student = tapped_student(student_network, input_shape=SHAPE)
            assert isinstance(student, Tapped)
            groups = student.groups
        teacher = Teacher(teacher_network, groups=groups, samples=4)
        trainer = run(tmp_path / mode, TeacherObjective(teacher, beta=beta), student, mode=mode)
        assert trainer.history[-1].loss < trainer.history[0].loss
        weights.append(trainer.model.state_dict())
    assert list(weights[0]) == list(student_network().state_dict()), "a checkpoint knows no taps"
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_attention_without_taps_and_losses_without_answers_are_refused() -> None:
    objective = TeacherObjective(Fixed(Answers(torch.zeros(2, 10))), beta=1.0)
    with pytest.raises(ModelError, match="has no taps"):
        objective.prepare(torch.zeros(2, *SHAPE), None, nn.Identity())
    with pytest.raises(ModelError, match="without the teacher's answers"):
        TeacherObjective(Fixed(Answers(torch.zeros(2, 10))))(torch.zeros(2, 10), torch.zeros(2, dtype=torch.long))


def test_a_teacher_of_other_classes_is_refused() -> None:
    objective = TeacherObjective(Teacher(functools.partial(edgetrain.create_model, "resnet20", 7, width=4)))
    x, labels = images(2)
    objective.prepare(x, None, nn.Identity())
    with pytest.raises(ModelError, match="7 outputs for a student with 10"):
        objective(torch.zeros(2, 10), labels)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"alpha": 1.5}, {"beta": -1.0}, {"alpha": float("nan")}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        TeacherObjective(Fixed(Answers(torch.zeros(2, 10))), **wrong)


def test_stored_answers_need_to_know_the_images(tmp_path: Path) -> None:
    source = open_source("digits", split="train", limit=20)
    loader = Loader(source, batch_size=7, image_size=(1, 16, 16), augment=False, shuffle=False, seed=0, drop_last=False)
    teacher = Teacher(functools.partial(edgetrain.create_model, "resnet8", in_channels=1, width=4))
    torch.manual_seed(0)
    store_answers(teacher, loader, path=tmp_path / "answers.safetensors", digest="")
    stored = StoredAnswers(tmp_path / "answers.safetensors")
    for images, _ in loader:
        torch.testing.assert_close(stored(images, loader.indices).logits, teacher(images).logits)
    with pytest.raises(UsageError, match="do not say which images"):
        stored(images, None)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.safetensors"]


def test_another_teacher_other_data_or_another_size_is_another_question() -> None:
    source = open_source("digits", split="train", limit=20)
    one = edgetrain.create_model("resnet8", in_channels=1, width=4)
    other = copy.deepcopy(one)
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-3
    asked = question_digest(one, source, {"input_shape": (1, 16, 16)})
    assert question_digest(copy.deepcopy(one), source, {"input_shape": (1, 16, 16)}) == asked
    assert question_digest(other, source, {"input_shape": (1, 16, 16)}) != asked
    assert question_digest(one, source, {"input_shape": (1, 8, 8)}) != asked
    assert question_digest(one, open_source("digits", split="test", limit=20), {"input_shape": (1, 16, 16)}) != asked
