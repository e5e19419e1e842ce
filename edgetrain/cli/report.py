"""``edgetrain report``: what fits, what lives at the peak, what the alternatives cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgetrain.cli.estimate import parse_shape
from edgetrain.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from edgetrain.memory import Times
    from edgetrain.memory.estimate import Precision
    from edgetrain.planner import Plan
    from edgetrain.profiles import Profile
    from edgetrain.report import Report, Run


def report(
    source: Annotated[
        str | None, typer.Argument(help="A plan's JSON, the folder of a run, a name of the zoo, or module:function.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model that a plan was made for.")] = None,
    input_shape: Annotated[str, typer.Option("--input", help="Shape of one sample, CxHxW, for a model.")] = "3x32x32",
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step, for a model.")] = 32,
    budget: Annotated[str | None, typer.Option(help="Peak memory, like 400MiB, for a model.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Profile; without it the plan's, and for a model this machine, which is timed.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="As of edgetrain plan.")] = "sgd",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    num_classes: Annotated[int, typer.Option(min=0, help="Classes; 0 leaves the model's own number.")] = 0,
    pooling: Annotated[
        str | None, typer.Option(help="Pooling sequence of a network of the zoo, c or b for each: ccb.")
    ] = None,
    no_devices: Annotated[bool, typer.Option("--no-devices", help="Leave the other devices out.")] = False,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two plans, runs or models: what differs and what it costs.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every instruction, too.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one page of HTML to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Report on the memory of a plan, a run or a model."""
    from edgetrain.files import write_atomically
    from edgetrain.report import all_profiles
    from edgetrain.report.compare import compare as compare_reports
    from edgetrain.report.compare import comparison_tables
    from edgetrain.report.page import page_of
    from edgetrain.report.text import markdown_text, table_lines, terminal_text

    if (source is None) == (compare is None):
        raise UsageError(
            found="a source and --compare" if source else "neither a source nor --compare",
            expected="one of them: what to report on, or two to compare",
            action="write edgetrain report PLAN|RUN|MODEL, or edgetrain report --compare A B",
        )
    if as_json and markdown:
        raise UsageError(found="--json and --markdown", expected="one of them", action="leave one out")
    if compare is not None and (html is not None or markdown):
        raise UsageError(
            found="--compare with --html or --markdown", expected="text or --json", action="report on each for a page"
        )

    def made(what: str, *, is_alone: bool) -> Report:
        return _report(
            what,
            model=model,
            shape=parse_shape(input_shape),
            batch=batch,
            budget=budget,
            device=device,
            optimizer=optimizer,
            precision=cast("Precision", precision),
            num_classes=num_classes,
            pooling=pooling,
            profiles=all_profiles() if is_alone and not no_devices else (),
        )

    if compare is not None:
        comparison = compare_reports(*(made(what, is_alone=False) for what in compare))
        if as_json:
            typer.echo(comparison.model_dump_json(indent=1))
            return
        for table in comparison_tables(comparison):
            typer.echo("\n".join(table_lines(table)))
        return
    assert source is not None
    found = made(source, is_alone=True)
    if html is not None:
        write_atomically(html, page_of(found).encode())
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    elif markdown:
        typer.echo(markdown_text(found))
    else:
        typer.echo(terminal_text(found, details="all" if explain else "short"))


def _report(
    source: str,
    *,
    model: str | None,
    shape: tuple[int, int, int],
    batch: int,
    budget: str | None,
    device: str | None,
    optimizer: str,
    precision: Precision,
    num_classes: int,
    pooling: str | None,
    profiles: tuple[Profile, ...],
) -> Report:
    import torch

    from edgetrain.cli.model_argument import model_maker
    from edgetrain.planner import Plan
    from edgetrain.report import read_run, report_of

    path = Path(source)
    run: Run | None = None
    plan: Plan | None = None
    if path.is_dir():
        run = read_run(path)
        plan, model = run.plan, model or run.model
        num_classes, pooling = num_classes or run.num_classes or 0, pooling or run.pooling
    elif path.is_file():
        plan = Plan.read(path)
    else:
        if path.suffix == ".json":
            raise UsageError(
                found=f"no file {source}", expected="the JSON of a plan", action="make it with edgetrain plan --out"
            )
        model = source
    net: nn.Module | None = None
    if model is not None:
        channels = shape[0] if plan is None else plan.input_shape[1]
        torch.manual_seed(0)
        net = model_maker(model, num_classes=num_classes or None, in_channels=channels, pooling=pooling)()
    times = None
    if plan is None:
        assert net is not None
        plan, times = _planned(net, shape, batch, budget, device, optimizer, precision)
    return report_of(
        plan,
        title=source,
        model=net,
        family=model,
        run=run,
        device=device,
        times=times,
        optimizer=optimizer,
        precision=precision,
        profiles=profiles,
    )


def _planned(
    net: nn.Module,
    shape: tuple[int, int, int],
    batch: int,
    budget: str | None,
    device: str | None,
    optimizer: str,
    precision: Precision,
) -> tuple[Plan, Times | None]:
    """The fastest plan that fits; with the seconds behind it where this machine was timed."""
    from edgetrain.planner import Planner

    planner = Planner(net, input_shape=shape, batch_size=batch, device=device, optimizer=optimizer, precision=precision)
    plan = planner.plan(budget)
    return plan, None if device is not None else planner.times_of(plan)
