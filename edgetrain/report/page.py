"""The report as one page of HTML that needs nothing else: no network, no JavaScript to be read.

The template stands beside this file. Jinja escapes every name; the drawings of :mod:`edgetrain.report.pictures` escape
theirs. The page carries the report's JSON, which the script does not need and other programs can read.
"""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment
from markupsafe import Markup

from edgetrain.report import pictures
from edgetrain.report.facts import Report
from edgetrain.report.tables import summary_lines, tables_of


def page_of(report: Report) -> str:
    """The page, complete."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    folder = files("edgetrain.report")
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    drawn = {
        "memory": pictures.memory_picture(report),
        "front": pictures.front_picture(report),
        "run": pictures.run_picture(report),
    }
    return template.render(
        report=report,
        lines=summary_lines(report),
        tables=tables_of(report),
        pictures={key: Markup(picture) for key, picture in drawn.items()},
        legend=pictures.legend(report),
        style=Markup(pictures.STYLE),
        script=Markup((folder / "page.js").read_text(encoding="utf-8")),
        # "<" cannot occur in JSON outside of strings, where \u003c is the same
        data=Markup(report.model_dump_json().replace("<", "\\u003c")),
    )
