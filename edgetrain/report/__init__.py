"""Memory budget reports: what fits, what lives at the peak, what the alternatives cost."""

from edgetrain.report.build import all_profiles, report_of
from edgetrain.report.devices import device_rows
from edgetrain.report.facts import KINDS, BlockRow, DeviceRow, Epoch, Fit, Instant, Kind, Level, Missing, Point, Report
from edgetrain.report.runs import Run, read_run

__all__ = [
    "KINDS",
    "BlockRow",
    "DeviceRow",
    "Epoch",
    "Fit",
    "Instant",
    "Kind",
    "Level",
    "Missing",
    "Point",
    "Report",
    "Run",
    "all_profiles",
    "device_rows",
    "read_run",
    "report_of",
]
