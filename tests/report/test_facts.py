"""The report's values: they add up to the planner's and the simulation's, and go to JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from torch import nn

import edgetrain
from edgetrain.errors import DataError, ModelError
from edgetrain.memory import measure_costs, predicted_times, program_seconds, simulate
from edgetrain.planner import Plan, Planner
from edgetrain.profiles import load_profile
from edgetrain.report import Report, device_rows, read_run, report_of
from edgetrain.train.trainer import EpochRecord

SHAPE, BATCH, DEVICE = (3, 16, 16), 8, "rpi5-4gb"
BUDGET = 5 * 2**20


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return edgetrain.create_model("resnet20")


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return edgetrain.plan(model, input_shape=SHAPE, batch_size=BATCH, budget=BUDGET, device=DEVICE)


@pytest.fixture(scope="module")
def report(model: nn.Module, plan: Plan) -> Report:
    profiles = [load_profile("gtx750"), load_profile("nano-4gb")]
    return report_of(plan, title="resnet20", model=model, profiles=profiles)


def test_memory_adds_up_to_the_plan_s_peak(report: Report, plan: Plan) -> None:
    assert max(instant.total_bytes for instant in report.memory) == plan.peak_bytes == report.peak_bytes
    assert len(report.memory) == len(plan.program.instructions) + 1
    assert report.memory[0].block == plan.program.names[0]
    assert report.peak_instant is not None
    assert report.peak_instant.total_bytes <= BUDGET


def test_blocks_say_what_the_plan_says(report: Report, model: nn.Module, plan: Plan) -> None:
    assert [row.name for row in report.blocks] == list(plan.program.names)
    assert [row.mode for row in report.blocks] == list(plan.modes)
    costs = measure_costs(model, input_shape=SHAPE, batch_size=BATCH)
    times = predicted_times(costs, load_profile(DEVICE))
    total = sum(row.seconds or 0.0 for row in report.blocks) + times.head
    assert total == pytest.approx(program_seconds(plan.program, times), rel=1e-12)
    assert total == pytest.approx(plan.step_seconds, rel=1e-12)
    simulation = simulate(plan.program, costs)
    head = next(m for m in simulation.moments if type(m.instruction).__name__ == "Head")
    start = simulation.moments[0].before_bytes
    assert sum(row.left_bytes or 0 for row in report.blocks) == head.before_bytes - start


def test_front_and_marks_are_the_planner_s(report: Report, plan: Plan) -> None:
    assert plan.costed is not None
    assert [(point.peak_bytes, point.seconds) for point in report.front] == list(plan.costed.front)
    names = {point.name for point in report.marked}
    assert {"chosen", "uniform keep_all", "uniform recompute"} <= names


def test_json_and_back(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_plan_alone_says_what_it_cannot_show(plan: Plan) -> None:
    alone = report_of(Plan.from_json(plan.to_json()), title="plan.json")
    assert {missing.section for missing in alone.missing} == {"memory", "run", "devices", "levels"}
    assert alone.peak_bytes == plan.peak_bytes
    assert all(row.left_bytes is None for row in alone.blocks)


def test_micro_batches_count_what_stays_from_part_to_part() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    planner = Planner(net, input_shape=(3, 8, 8), batch_size=8, device=DEVICE, micro_batches=4)
    plan = planner.plan()
    found = report_of(plan, title="net", model=net)
    assert max(instant.total_bytes for instant in found.memory) == plan.peak_bytes
    assert {instant.batch for instant in found.memory} == {4 * 8 * 3 * 8 * 8}  # all parts wait from the start


def test_on_a_cuda_profile_slack_and_context_are_shown(model: nn.Module) -> None:
    plan = edgetrain.plan(model, input_shape=SHAPE, batch_size=BATCH, device="gtx750")
    found = report_of(plan, title="resnet20", model=model)
    assert plan.costed is not None
    assert plan.costed.reserved_bytes is not None
    context = load_profile("gtx750").context_bytes or 0
    assert max(instant.total_bytes for instant in found.memory) == plan.costed.reserved_bytes + context
    assert found.limit_bytes == plan.costed.budget_bytes + context  # type: ignore[operator]


def test_on_another_device_the_plan_stays_what_it_is(plan: Plan, model: nn.Module) -> None:
    found = report_of(plan, title="moved", model=model, device="gtx750")
    profile = load_profile("gtx750")
    assert (found.device, found.budget_bytes) == ("gtx750", profile.default_budget_bytes)
    assert (found.reserved_bytes, found.step_seconds, found.marked) == (None, None, ())
    assert [row.mode for row in found.blocks] == list(plan.modes)
    assert {instant.context for instant in found.memory} == {profile.context_bytes}
    assert "front" in {missing.section for missing in found.missing}


def test_devices_agree_with_estimates(report: Report, model: nn.Module) -> None:
    row = report.devices[0]
    plain = edgetrain.estimate(model, input_shape=SHAPE, batch_size=BATCH, device="gtx750")
    assert row.device == "gtx750"
    assert row.fits[0].mode == "keep_all"
    assert row.fits[0].needed_bytes == plain.process_peak_bytes
    assert row.fits[0].fits is plain.fits is True
    assert row.available_bytes == plain.available_bytes
    largest = row.fits[0].largest_batch
    assert largest is not None
    at = {
        n: edgetrain.estimate(model, input_shape=SHAPE, batch_size=n, device="gtx750") for n in (largest, 2 * largest)
    }
    assert [at[n].fits for n in at] == [True, False]
    assert row.fits[1].largest_batch >= 2 * largest


def test_levels_are_what_memory_predicts(report: Report, model: nn.Module, plan: Plan) -> None:
    whole = edgetrain.estimate(
        model, input_shape=SHAPE, batch_size=BATCH, device=DEVICE, wrap=lambda net: edgetrain.wrap(net, plan)
    )
    said, simulated, traced = report.levels
    assert (said.predicted, said.found) == (plan.peak_bytes, plan.peak_bytes)
    assert (simulated.predicted, simulated.found, simulated.error) == (plan.peak_bytes, whole.peak_bytes, 0)
    assert (traced.predicted, traced.found) == (whole.peak_bytes, whole.process_peak_bytes)


def test_a_model_that_is_not_the_plan_s_is_refused(plan: Plan) -> None:
    with pytest.raises(ModelError, match="that the plan was made for"):
        report_of(plan, title="frozen", model=edgetrain.freeze(edgetrain.create_model("resnet20"), 4))


def test_another_precision_than_the_plan_s_shows(plan: Plan, model: nn.Module) -> None:
    said = report_of(plan, title="bf16", model=model, precision="bf16").levels[0]
    assert said.predicted == plan.peak_bytes > 1.5 * said.found


def test_the_source_s_formula_is_a_level_of_its_networks() -> None:
    hybrid = edgetrain.create_model("hybrid18")
    plan = edgetrain.uniform_plan(hybrid, "invert_layerwise", input_shape=(3, 32, 32), batch_size=32)
    found = report_of(plan, title="hybrid18", model=hybrid, family="hybrid18")
    formula = found.levels[0]
    assert formula.name == "closed formula"
    assert abs(formula.error) < 0.15
    assert device_rows(hybrid, input_shape=(3, 32, 32), batch_size=2, profiles=[]) == ()


def test_a_run(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan.to_json())
    records = [EpochRecord(1, 2.0, 0.25, 0.2, 16.0, 4.0), EpochRecord(2, 1.0, 0.5, None, 32.0, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in records))
    (tmp_path / "result.json").write_text(json.dumps({"peak_bytes": 2 * plan.peak_bytes, "model": "resnet20"}))
    run = read_run(tmp_path)
    found = report_of(run.plan, title="run", run=run)
    assert [(e.loss, e.test_accuracy) for e in found.epochs] == [(2.0, 0.2), (1.0, None)]
    peak, seconds = found.levels
    assert peak.error == -0.5
    assert seconds.found == BATCH / 32.0
    assert seconds.error == pytest.approx(plan.step_seconds * 32.0 / BATCH - 1)


@pytest.mark.parametrize("damage", ["no plan", "half a line"])
def test_a_damaged_run_is_refused(plan: Plan, tmp_path: Path, damage: str) -> None:
    if damage == "half a line":
        (tmp_path / "plan.json").write_text(plan.to_json())
        (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "lo')
    with pytest.raises(DataError):
        read_run(tmp_path)
