# SPDX-License-Identifier: Apache-2.0
"""What was measured, as JSON and as Markdown tables: whole after every case."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
OURS = "mosaic"
ROUNDING = 1e-5  # errors below it are those of float32, and their ratios mean nothing


def write_results(
    folder: Path, stem: str, about: Mapping[str, Any], records: Iterable[Record]
) -> None:
    """Writes `stem`.json and `stem`.md, keeping the older cases that are not measured.

    Args:
      about: of the run; a case that is measured again takes its date and machine.
      records: of `worker.measure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    old = json.loads(path.read_text())["cases"] if path.exists() else []
    cases = {(r["operation"], r["name"]): r for r in [*old, *records]}
    document = {**about, "cases": list(cases.values())}
    _replace(path, json.dumps(document, indent=1) + "\n")
    _replace(folder / f"{stem}.md", format_results(document))


def read_events(log: Path) -> list[dict[str, Any]]:
    """Returns what a worker has written so far, without a line that is half there."""
    events = []
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


def _replace(path: Path, text: str) -> None:
    """Writes a file that a killed process leaves old or new, never half."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def format_results(document: Mapping[str, Any]) -> str:
    """Returns the Markdown of a document of `write_results`."""
    about = {k: v for k, v in document.items() if k not in ("cases", "ceilings")}
    lines = [f"# {'Dry run' if document.get('dry') else document['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    ceilings = document.get("ceilings")
    if ceilings:
        lines.append(
            f"- ceilings measured in this run: {ceilings['flops_per_s'] / 1e12:.0f} "
            f"TFLOP/s, {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, "
            f"{1e6 * ceilings['launch_s']:.1f} us a launch"
        )
    if document.get("dry"):
        lines.append("- shapes are tiny and the times mean nothing")
    operations = dict.fromkeys(r["operation"] for r in document["cases"])
    for operation in operations:
        rows = [r for r in document["cases"] if r["operation"] == operation]
        lines += ["", f"## {operation}", "", *_table(rows)]
        lines += _backward_lines(rows)
        if tiles := [row for r in rows for row in _tile_rows(r)]:
            lines += ["", "| case | kernel | tile | us | |", "|---" * 5 + "|", *tiles]
    return "\n".join(lines) + "\n"


def _table(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(name for r in records for name in r.get("timings", ()))
    others = [name for name in names if name != OURS]
    head = ["case", "us", "rate", "share", "spread", "error / xla's", "check"]
    head += ["scratch, MB", "xla's"]
    head += [f"{name}, us" for name in others]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for record in records:
        cells = [record["name"], *_our_cells(record), *_scratch_cells(record)]
        cells += [_cell_of(record, name) for name in others]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [
        f"- {r['name']}, {name}: {reason}"
        for r in records
        for name, reason in r.get("failures", {}).items()
    ]
    return lines + ([""] if failed else []) + failed


def _backward_lines(records: Sequence[Record]) -> list[str]:
    """Returns what a backward pass takes, where only both passes were timed."""
    by_name = {record["name"]: record for record in records if "flops" in record}
    lines = []
    for name, both in by_name.items():
        head, found, rest = name.partition("forward-backward-")
        forward = by_name.get(f"forward-{rest.removesuffix('-fused')}")
        if head or not found or forward is None:
            continue
        cells = []
        for who, timing in both["timings"].items():
            if who in forward["timings"]:
                us = timing["median_us"] - forward["timings"][who]["median_us"]
                rate = (both["flops"] - forward["flops"]) / us / 1e6
                cells.append(f"{who} {us:.0f} us, {rate:.0f} TFLOP/s")
        lines.append(f"- {rest}: {'; '.join(cells)}")
    return ["", "Backward alone, as both passes less forward:", *lines] * bool(lines)


def _our_cells(record: Record) -> list[str]:
    timing = record.get("timings", {}).get(OURS)
    check = record.get("verdict", {}).get(OURS, "not checked")
    errors = record.get("errors", {})
    ratio = "-"
    if OURS in errors and "xla" in errors:
        pairs = zip(errors[OURS], errors["xla"], strict=True)
        ratio = f"{max(a / (b + ROUNDING) for a, b in pairs):.2f}"
    if timing is None:
        return ["-", "-", "-", "-", ratio, check]
    seconds = timing["median_us"] / 1e6
    if record["flops"] > 100 * record["num_bytes"]:
        rate = f"{record['flops'] / seconds / 1e12:.0f} TFLOP/s"
    else:
        rate = f"{record['num_bytes'] / seconds / 1e9:.0f} GB/s"
    spread = (timing["high_us"] - timing["low_us"]) / timing["median_us"]
    mark = " (launch-bound)" if record.get("launch_bound") else ""
    return [
        f"{timing['median_us']:.1f}{mark}",
        rate,
        f"{record['share']:.3f}" if record.get("share") else "-",
        f"{100 * spread:.1f} %",
        ratio,
        check,
    ]


def _scratch_cells(record: Record) -> list[str]:
    sizes = record.get("scratch_bytes", {})
    return [
        f"{sizes[name] / 1e6:.1f}" if name in sizes else "-" for name in (OURS, "xla")
    ]


def _cell_of(record: Record, name: str) -> str:
    timing = record.get("timings", {}).get(name)
    return f"{timing['median_us']:.1f}" if timing else "-"


def _tile_rows(record: Record) -> list[str]:
    return [
        f"| {record['name']} | {search['kernel']} | {row['tile']} "
        f"| {row.get('us') or '-'} | {row.get('said', '')} |"
        for search in record.get("searches", ())
        for row in sorted(search["tiles"], key=lambda row: row.get("us") or 1e30)
    ]
