"""The pictures of the README and of docs/report.md, drawn from one report by the code that draws the page.

    python tools/report_pictures.py              # plans again, and writes report.json, report_*.svg in docs/results
    python tools/report_pictures.py --redraw     # from the report.json that is there

The plan is for a device profile, so nothing is measured: the same source gives the same pictures. The screenshot
report.png is taken from the page where a Chromium and playwright are installed (``--screenshot``).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

import edgetrain
from edgetrain.profiles import load_profile
from edgetrain.report import Report, report_of
from edgetrain.report.page import page_of
from edgetrain.report.pictures import front_picture, legend, memory_picture, standalone

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
MODEL, SHAPE, BATCH, BUDGET, DEVICE = "hybrid18", (3, 32, 32), 512, "320MiB", "gtx750"
SHOWN = ("gtx750", "gtx1080ti", "nano-4gb", "orin-nano-4gb", "orin-nano-8gb", "agx-orin-64gb", "rpi5-4gb")


def fresh_report() -> Report:
    """The report on the example of the README."""
    torch.manual_seed(0)
    model = edgetrain.create_model(MODEL)
    plan = edgetrain.plan(model, input_shape=SHAPE, batch_size=BATCH, budget=BUDGET, device=DEVICE)
    profiles = [load_profile(name) for name in SHOWN]
    return report_of(plan, title=MODEL, model=model, family=MODEL, profiles=profiles)


def pictures_of(report: Report) -> dict[str, str]:
    """File names and what is in them."""
    return {
        "report_memory.svg": standalone(memory_picture(report), legend(report)) + "\n",
        "report_front.svg": standalone(front_picture(report)) + "\n",
    }


def screenshot(report: Report, file: Path) -> None:
    """The upper part of the page as a PNG, in a Chromium that EDGETRAIN_CHROMIUM or playwright names."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "report.html"
        page_file.write_text(page_of(report), encoding="utf-8")
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("EDGETRAIN_CHROMIUM"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 1000}, color_scheme="light")
        page.goto(page_file.as_uri())
        peak = max(range(len(report.memory)), key=lambda k: report.memory[k].total_bytes)
        page.locator("#memory .hit").nth(peak).hover()
        page.screenshot(path=file)
        browser.close()


def main() -> None:
    """Writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--screenshot", action="store_true")
    arguments = parser.parse_args()
    file = RESULTS / "report.json"
    report = Report.model_validate_json(file.read_text()) if arguments.redraw else fresh_report()
    file.write_text(report.model_dump_json(indent=1) + "\n")
    for name, text in pictures_of(report).items():
        (RESULTS / name).write_text(text, encoding="utf-8")
    if arguments.screenshot:
        screenshot(report, RESULTS / "report.png")


if __name__ == "__main__":
    main()
