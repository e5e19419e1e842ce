"""What a teacher adds to the memory of a training step: predicted and measured, alive and as stored answers.

A hybrid18 learns from a WRN-16-2, both with fresh weights, on real images: cross-entropy alone, distillation, attention
transfer; keeping everything and inverting. Predicted: the simulated step or the teacher's forward pass before it, the
larger one. Measured: torch's own events for one step, teacher included, every case in a process of its own; weights of
both networks and the batch are added to both, gradients are in the step, no optimiser. Besides, the growth of the
process in that step.

    python tools/objectives_memory.py --data ../shared/data/fashion-mnist
    python tools/objectives_memory.py --json
    python tools/objectives_memory.py --data ../shared/data/fashion-mnist --out docs/results/objectives_cpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import publish

from edgetrain.units import format_mib

STUDENT, TEACHER = "hybrid18", "wrn-16-2"
SHAPE = (1, 32, 32)
PLANS = ("keep_all", "invert_layerwise")
TAUGHT = tuple(itertools.product(("distillation", "attention-transfer"), ("live", "stored")))
CASES = tuple((*pair, plan) for plan in PLANS for pair in (("cross-entropy", "none"), *TAUGHT))


def measure(objective: str, teaching: str, mode: str, data: str, batch_size: int) -> dict[str, Any]:
    """Bytes of a step in this process."""
    import torch

    import edgetrain
    from edgetrain.memory import Guest, measure_costs, measure_peak, measure_process_growth, simulate
    from edgetrain.nn.slices import SLICE_BYTES
    from edgetrain.targets import return_large_blocks
    from edgetrain.train import CrossEntropy, Teacher, TeacherObjective, tapped_student
    from edgetrain.train.data import Loader, open_source
    from edgetrain.train.distillation import Answering
    from edgetrain.train.stored_answers import StoredAnswers, store_answers

    return_large_blocks(2 * SLICE_BYTES)
    torch.manual_seed(0)
    source = open_source(data, split="train", limit=batch_size)
    shared: dict[str, Any] = {"image_size": SHAPE, "augment": False, "shuffle": False, "seed": 0, "drop_last": False}
    loader = Loader(source, batch_size=batch_size, **shared)
    x, labels = next(iter(loader))
    student = tapped_student(lambda: edgetrain.create_model(STUDENT, in_channels=1), input_shape=SHAPE)
    attention = objective == "attention-transfer"
    model = student if attention else student.model
    network = edgetrain.create_model(TEACHER, in_channels=1).eval()
    teacher = Teacher(lambda: network, groups=student.groups if attention else ())
    guest, teacher_bytes = Guest(), 0
    answering: Answering | None = None
    if teaching != "none":
        guest = teacher.memory(input_shape=SHAPE, batch_size=batch_size)
        teacher_bytes = _state_bytes(network)
        answering = teacher
    with tempfile.TemporaryDirectory() as folder:
        if teaching == "stored":
            path = Path(folder) / "answers.safetensors"
            store_answers(teacher, Loader(source, batch_size=32, **shared), path=path, digest="")
            stored = StoredAnswers(path)
            answering, teacher_bytes, guest = stored, 0, stored.guest(batch_size)
            teacher.forget()
            del network
        learned: Any = CrossEntropy()
        if answering is not None:
            learned = TeacherObjective(answering, alpha=0.0 if attention else 0.9, beta=1e3 if attention else 0.0)
        loss = {} if answering is None else {"loss": learned.rehearsal}
        plan = edgetrain.uniform_plan(model, mode, input_shape=SHAPE, batch_size=batch_size)  # type: ignore[arg-type]
        costs = measure_costs(model, input_shape=SHAPE, batch_size=batch_size, optimizer=None, **loss)
        resident = costs.weight_bytes + teacher_bytes + x.numel() * x.element_size()
        answers = guest.standing_bytes - teacher_bytes
        stepped = simulate(plan.program, costs, optimizer_bytes=0).peak_bytes + guest.standing_bytes
        predicted = max(stepped, resident + answers + guest.before_bytes)
        net = edgetrain.wrap(model, plan)

        def step(images: torch.Tensor, targets: torch.Tensor) -> None:
            if answering is not None:
                learned.prepare(images, torch.arange(len(images)), model)
            learned(net(images), targets).backward()
            if attention:
                student.release()

        step(x[:2], labels[:2])  # libraries are loaded
        for parameter in model.parameters():
            parameter.grad = None
        process = measure_process_growth(lambda: step(x, labels))
        for parameter in model.parameters():
            parameter.grad = None
        measured = resident + measure_peak(lambda: step(x, labels)).allocator_peak_bytes
    return {
        "objective": objective,
        "teacher": teaching,
        "mode": mode,
        "teacher_samples": teacher.samples if teaching == "live" else None,
        "teacher_weight_bytes": teacher_bytes,
        "teacher_forward_bytes": guest.before_bytes,
        "answer_bytes": answers,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "measured_over_predicted": measured / predicted,
        "process_growth_bytes": process,
    }


def _state_bytes(network: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def in_fresh_process(case: tuple[str, str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` of ``case`` in a process of its own."""
    command = [sys.executable, __file__, "--case", *case, "--data", arguments.data, "--batch", str(arguments.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(case)}: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> None:
    """Measures all cases, or the one of ``--case``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="data set, as for edgetrain train; grey images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, data=arguments.data, batch_size=arguments.batch)))
        return
    found = []
    for case in CASES:
        row = in_fresh_process(case, arguments)
        found.append(row)
        numbers = f"{format_mib(row['predicted_bytes']):>12} {format_mib(row['measured_bytes']):>12}"
        where = sys.stderr if arguments.json else sys.stdout
        print(f"{' '.join(case):<44} {numbers} {row['measured_over_predicted']:.3f}", file=where, flush=True)
    publish(found, out=arguments.out, as_json=arguments.json, seed=0, batch_size=arguments.batch, shape=SHAPE)


if __name__ == "__main__":
    main()
