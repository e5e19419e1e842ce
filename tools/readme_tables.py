"""Writes the measured tables of README.md and docs from the files in docs/results.

python tools/readme_tables.py            # rewrites what stands between the markers
python tools/readme_tables.py --check    # exits with 1 if anything would change
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from edgetrain.units import MIB

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            "memory.md",
            "planning.md",
            "time.md",
            "engines.md",
            "dirac.md",
            "folding.md",
            "objectives.md",
            "lite.md",
            "finetune.md",
            "cli.md",
        )
    ),
)


def load(name: str) -> dict[str, Any] | None:
    """A result file, or None where it was not measured."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def provenance(document: dict[str, Any]) -> str:
    """One line: command, machine, versions."""
    machine, versions = document["machine"], document["versions"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return (
        f"`{document['command']}`; {machine['processor']}, {threads}; "
        f"Python {versions['python']}, torch {versions['torch']}; commit {versions['edgetrain']}"
    )


def memory() -> str:
    """Bytes per pixel: printed, closed formula, measured."""
    document = load("memory_table_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| network and mode | printed | closed formula | allocator | process | process / allocator | own heap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = [row["printed"], row["closed_form"], row["allocator"], row["process"]]
        numbers = " | ".join("-" if cell is None else f"{cell:.0f}" for cell in cells)
        lines.append(f"| {row['label']} | {numbers} | {row['process_over_allocator']:.2f} | {row['own_heap']:.0f} |")
    return "\n".join([*lines, "", provenance(document)])


def time() -> str:
    """Step times against plain autograd."""
    document = load("step_time_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = ["| network and mode | time / plain autograd | range over the pairs |", "|---|---|---|"]
    for row in document["rows"]:
        lines.append(f"| {row['label']} | {row['ratio']:.2f} | {row['ratio_low']:.2f} - {row['ratio_high']:.2f} |")
    return "\n".join([*lines, "", provenance(document)])


def peers() -> str:
    """The public libraries on the same mathematics."""
    document = load("peers_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| C, depth | | peak MiB | time / plain | gradient error | batches that batch norm counts |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        lines.append(
            f"| {row['channels']}, {row['depth']} | {row['name']} | {row['peak_bytes'] / 2**20:.1f} | "
            f"{row['time_over_plain']:.2f} | {row['gradient_error']:.1e} | {row['batches_counted']} |"
        )
    return "\n".join([*lines, "", provenance(document)])


def parity() -> str:
    """Training by inversion against keeping everything."""
    document = load("train_parity.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| 10,000 images of CIFAR-10 (JPEG) | test accuracy | last training loss | peak of the run |",
        "|---|---|---|---|",
    ]
    for row in document["rows"]:
        last = row["history"][-1]
        cap = "" if row["budget_bytes"] is None else f" (cap {row['budget_bytes'] / 2**20:.0f} MiB, enforced)"
        lines.append(
            f"| {row['model']}, {row['label']} | {last['test_accuracy']:.2%} | {last['loss']:.4f} | "
            f"{row['peak_bytes'] / 2**20:.0f} MiB{cap} |"
        )
    return "\n".join([*lines, "", provenance(document)])


def prediction() -> str:
    """How far predictions of a step's memory are off, ours and those of other tools."""
    document = load("prediction_error_cpu.json")
    if document is None:
        return "Not measured yet."
    names = {"allocator": "edgetrain, allocator peak", "process": "edgetrain, growth of the process"}
    lines = ["| error in percent | cases | median | worst | lowest | highest |", "|---|---|---|---|---|---|"]
    for key, found in document["summary_percent"].items():
        figures = [f"{found[name]:.2f}" for name in ("median_absolute", "worst_absolute")]
        signed = [f"{found[name]:+.2f}" for name in ("lowest", "highest")]
        lines.append(f"| {names.get(key, key)} | {found['cases']} | {' | '.join(figures + signed)} |")
    networks = len({row["network"] for row in document["rows"]})
    return "\n".join([*lines, "", f"{networks} networks; {provenance(document)}"])


def steps() -> str:
    """How far sums of block times are off the whole step."""
    document = load("step_prediction_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| network | batch, pixels | mode | step, ms | measured / step | predicted / step |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        lines.append(
            f"| {row['network']} | {row['batch']}, {row['side']}x{row['side']} | `{row['mode']}` | "
            f"{row['whole_s'] * 1e3:.0f} | {row['measured_ratio']:.2f} | {row['predicted_ratio']:.2f} |"
        )
    return "\n".join([*lines, "", provenance(document)])


def planner() -> str:
    """Plans at fractions of the keep-all peak against the fastest of torch's ways that fits."""
    document = load("planner_bench_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| network | budget | plan: peak | of keep-all time | torch's fastest that fits | plan / torch |",
        "|---|---|---|---|---|---|",
    ]
    rows = document["rows"]
    for row in rows:
        head = f"| {row['network']}, batch {row['batch']} | {row['budget']:.0%}, {row['budget_bytes'] / 2**20:.0f} MiB"
        peer = "none" if row["peer"] is None else row["peer"]
        if "infeasible" in row:
            lines.append(f"{head} | none fits | | {peer} | |")
            continue
        ratio = "" if row["over_peer"] is None else f"{row['over_peer']:.2f}"
        if row.get("eager_peer") not in (None, row["peer"]):
            peer += f"; without a compiler {row['eager_peer']}"
            ratio += f"; {row['over_eager_peer']:.2f}"
        peak = f"{row['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(f"{head} | {peak} | {row['over_keep_all']:.2f} | {peer} | {ratio} |")
    return "\n".join([*lines, "", provenance(document) + _earlier(document)])


def _earlier(document: dict[str, Any]) -> str:
    """Networks whose rows are of other commits than the rest."""
    earlier: dict[str, list[str]] = {}
    for row in document["rows"]:
        commit = row.get("commit", document["versions"]["edgetrain"])
        if commit != document["versions"]["edgetrain"] and row["network"] not in earlier.setdefault(commit, []):
            earlier[commit].append(row["network"])
    return "".join(f"; {', '.join(names)}: commit {commit}" for commit, names in earlier.items())


def heap() -> str:
    """What page faults cost."""
    document = load("heap_time_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| network | step with `kept` | glibc's default / kept | `returned` / kept | faults: default, returned, kept "
        "| resident: default, returned, kept |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        name = f"{row['network']}, batch {row['batch']}{', channels last' if row['channels_last'] else ''}"
        faults = ", ".join(f"{row[f'{way}_faults']:.0f}" for way in ("default", "returned", "kept"))
        held = ", ".join(f"{row[f'{way}_resident_bytes'] / 2**20:.0f}" for way in ("default", "returned", "kept"))
        lines.append(
            f"| {name} | {1e3 * row['kept_s']:.0f} ms | {row['default_over_kept']:.2f} | "
            f"{row['returned_over_kept']:.2f} | {faults} | {held} MiB |"
        )
    return "\n".join([*lines, "", provenance(document)])


def monet() -> str:
    """Overheads, predicted and measured, beside published ones."""
    document = load("monet_table_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| network | budget of the keep-all peak | predicted | measured, on few samples | MONeT, published |",
        "|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        ours = f"{row['overhead']:+.1%}" if "overhead" in row else "none fits"
        few = f"{row['few_overhead']:+.1%} ({row['few']})" if "few_overhead" in row else "none fits"
        head = f"| {row['network']}, batch {row['batch']} | {row['fraction']:.0%}"
        lines.append(f"{head} | {ours} | {few} | {row['published_overhead']:+.1%} |")
    return "\n".join([*lines, "", provenance(document) + _earlier(document)])


def engines() -> str:
    """Sizes of engines, and the device memory that the builder names."""
    document = load("engine_table.json")
    if document is None:
        return "Not measured yet."
    columns = ("onnx", "engine", "weights", "activation")
    lines = ["| network | precision | ONNX | engine | weights | activations, scratch included | build |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in document["rows"]:
        sizes = " | ".join(f"{row[f'{name}_bytes'] / MIB:.2f} MiB" for name in columns)
        options = "".join(f", {name} {value}" for name, value in row["options"].items())
        lines.append(f"| {row['model']}{options} | {row['precision']} | {sizes} | {row['build_seconds']:.1f} s |")
    row = document["rows"][0]
    shape = "x".join(map(str, row["input_shape"]))
    about = f"Batch {row['batch']} of {shape}, {row['builder']}, compute capability {row['compute_capability']}. "
    return "\n".join([*lines, "", about + provenance(document)])


def dirac() -> str:
    """Plain and Dirac chains at growing depth beside what the source prints, and I + W; medians over the seeds."""
    document = load("dirac_depth.json")
    if document is None:
        return "Not measured yet."
    printed = {10: ("equal", ""), 34: ("91.2 %", "92.8 %"), 52: ("88 %", "-"), 100: ("40 %", "92.4 %")}
    runs: dict[tuple[str, float], list[float]] = {}
    for row in document["rows"]:
        key = (row["network"], row["depth"] if row["sigma"] is None else row["sigma"])
        runs.setdefault(key, []).append(row["curve"][-1]["test_accuracy"] if row["curve"] else 0.0)
    found = {key: f"{100 * statistics.median(values):.1f} %" for key, values in runs.items()}
    lines = ["| layers | plain | Dirac | printed on CIFAR-10: plain | Dirac |", "|---|---|---|---|---|"]
    for name, depth in found:
        if name == "plain":
            others = " | ".join(printed.get(int(depth), ("-", "-")))
            lines.append(f"| {depth} | {found[name, depth]} | {found['dirac', depth]} | {others} |")
    lines += ["", "| sigma of I + W | test accuracy |", "|---|---|"]
    lines += [f"| {sigma:g} | {text} |" for (name, sigma), text in found.items() if name == "I + W"]
    return "\n".join([*lines, "", provenance(document)])


def coupling() -> str:
    """Ways to compute batch norm after a coupling, against one batch norm on the joined halves."""
    document = load("coupling_folds.json")
    if document is None:
        return "Not measured yet."
    ways = [way for way in dict.fromkeys(row["way"] for row in document["rows"]) if way != "joined"]
    lines = [f"| coupling layers of | joined, ms | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    stages: dict[str, dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        name = f"{row['network']}, {row['channels']} channels, {row['side']}x{row['side']}"
        stages.setdefault(name, {})[row["way"]] = row
    for name, rows in stages.items():
        ratios = " | ".join(f"{rows[way]['over_joined']:.2f}" for way in ways)
        lines.append(f"| {name} | {rows['joined']['latency_ms']:.2f} | {ratios} |")
    return "\n".join([*lines, "", provenance(document)])


def folded() -> str:
    """Folded against unfolded networks in ONNX Runtime."""
    document = load("export_bench_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| network | graph | nodes | latency, ms | / unfolded | / plain | process, MiB | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        plain = f"{row['over_plain']:.2f}" if "over_plain" in row else ""
        difference = f"{row['max_difference']:.1e}" if "max_difference" in row else ""
        lines.append(
            f"| {row['network']} | {row['graph']} | {row['nodes']} | {row['latency_ms']:.2f} | "
            f"{row['over_unfolded']:.2f} | {plain} | {row['process_bytes'] / MIB:.1f} | {difference} |"
        )
    return "\n".join([*lines, "", f"Batch {document['rows'][0]['batch_size']}. {provenance(document)}"])


def objectives() -> str:
    """What a teacher adds to a step."""
    document = load("objectives_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| plan | objective | teacher | predicted | measured | measured / predicted | process |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        sizes = [row[f"{name}_bytes"] / MIB for name in ("predicted", "measured", "process_growth")]
        numbers = f"{sizes[0]:.1f} MiB | {sizes[1]:.1f} MiB | {row['measured_over_predicted']:.4f} | {sizes[2]:.1f} MiB"
        lines.append(f"| {row['mode']} | {row['objective']} | {row['teacher']} | {numbers} |")
    return "\n".join([*lines, "", f"Batch {document['batch_size']}. {provenance(document)}"])


def lite() -> str:
    """A step with and without PyTorch."""
    document = load("lite_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| runner | plan | limit of data | process peak | start to first step, s | step, s | of torch's | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cap = f"{row['cap_bytes'] / MIB:.0f} MiB" if "cap_bytes" in row else ""
        found = "did not run | | | | |"
        if row["ran"]:
            times = f"{row['times_torch']:.2f}" if "times_torch" in row else ""
            found = (
                f"{row['process_peak_bytes'] / MIB:.0f} MiB | {row['first_step_seconds']:.1f} | "
                f"{row['step_seconds']:.2f} | {times} | {row['images_per_second']:.1f} |"
            )
        lines.append(f"| {row['runner']} | {row['plan']} | {cap} | {found}")
    settings = document["settings"]
    return "\n".join([*lines, "", f"{settings['model']}, batch {settings['batch']}. {provenance(document)}"])


def lite_cap() -> str:
    """Training inside a cap on the whole process."""
    document = load("lite_cap_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = [
        "| data | epochs | runner | loss, first epoch | last | test accuracy | process peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        found = "did not run | | | |"
        if row["ran"]:
            found = (
                f"{row['loss_first_epoch']:.2f} | {row['loss_last_epoch']:.2f} | {row['test_accuracy']:.1%} | "
                f"{row['process_peak_bytes'] / MIB:.0f} MiB |"
            )
        data = f"{row['data']} {row['image_size']}x{row['image_size']}"
        lines.append(f"| {data} | {row['epochs']} | {row['runner']} | {found}")
    settings = document["settings"]
    about = (
        f"{settings['model']}, batch {settings['batch']}, cap {settings['cap']}; CIFAR-10: {settings['train']} images."
    )
    return "\n".join([*lines, "", f"{about} {provenance(document)}"])


def finetune(name: str = "finetune_cpu.json") -> str:
    """Fine-tuning inside a cap against keeping everything, seed by seed."""
    document = load(name)
    if document is None:
        return "Not measured yet."
    lines = [
        "| seed | | accuracy | macro-F1 | peak of the run | step, predicted | cap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cap = "none" if row["budget_bytes"] is None else f"{row['budget_bytes'] / MIB:.0f} MiB, enforced"
        sizes = f"{row['peak_bytes'] / MIB:.0f} MiB | {row['planned_bytes'] / MIB:.0f} MiB"
        lines.append(
            f"| {row['seed']} | {row['label']} | {row['accuracy']:.2%} | {row['macro_f1']:.2%} | {sizes} | {cap} |"
        )
    differences = []
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        found = document["summary"][key]
        error = found["standard_error_points"]
        spread = "" if error is None else f" (standard error {error:.2f})"
        differences.append(f"{found['difference_points']:+.2f} points of {name}{spread}")
    row = document["rows"][0]
    shape = "x".join(map(str, row["input_shape"]))
    about = [
        f"Inside the cap less keeping everything: {', '.join(differences)}; gradients of a step differ by "
        f"{document['gradient_difference']:.0e} of their norm.",
    ]
    for key, what in (("plan_is_the_same", "The plan"), ("recomputing_is_the_same", "Recomputing")):
        if key in document["summary"]:
            same = document["summary"][key]
            about.append(f"{what} gave {'the same losses and test results, bit for bit' if same else 'other losses'}.")
    about += [
        f"{document['model']}, batch {row['batch_size']} of {shape}, {row['epochs']} epochs; {row['images']['train']} "
        f"photographs to train on, {row['images']['test']} to test on, of which {document['largest_class']:.1%} are of "
        f"the largest class; after {document['pretrained']['images']} images of {document['pretrained']['data']}.",
        provenance(document),
    ]
    return "\n".join([*lines, "", *about])


def budgets() -> str:
    """How a run ends under each of the budgets, from far too small to ample."""
    document = load("budget_sweep_cpu.json")
    if document is None:
        return "Not measured yet."
    lines = ["| budget | the run | its peak, pages of files left out |", "|---|---|---|"]
    for row in sorted(document["rows"], key=lambda row: row["budget_bytes"]):
        told, peak = f"failed with exit code {row['exit_code']}", ""
        if row["outcome"] == "refused":
            told = f"refused, names {row['named_bytes'] / MIB:.0f} MiB"
        elif row["outcome"] == "trained":
            told = "trained" + (f", fell back {row['events']} times" if row["events"] else "")
            peak = f"{(row['peak_bytes'] - row['file_bytes']) / MIB:.1f} MiB"
        lines.append(f"| {row['budget_bytes'] / MIB:.0f} MiB | {told} | {peak} |")
    about = "One epoch of a hybrid network of width 8 on digits of 16x16 in batches of 64, each budget a fresh process."
    return "\n".join([*lines, "", f"{about} {provenance(document)}"])


TABLES = {
    "budgets": budgets,
    "finetune": finetune,
    "finetune-exact": functools.partial(finetune, "finetune_exact_cpu.json"),
    "lite": lite,
    "lite-cap": lite_cap,
    "memory": memory,
    "prediction": prediction,
    "time": time,
    "steps": steps,
    "peers": peers,
    "parity": parity,
    "planner": planner,
    "heap": heap,
    "monet": monet,
    "engines": engines,
    "dirac": dirac,
    "coupling": coupling,
    "folded": folded,
    "objectives": objectives,
}


def render(text: str) -> str:
    """``text`` with every marked table written anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table()}{match[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrites or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        rendered = render(text)
        if rendered == text:
            continue
        if arguments.check:
            sys.exit(f"{page.name} does not agree with docs/results: run python tools/readme_tables.py")
        page.write_text(rendered)


if __name__ == "__main__":
    main()
