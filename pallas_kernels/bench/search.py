# SPDX-License-Identifier: Apache-2.0
"""Times the tiles a kernel may run with, and keeps the best in the device's table."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench import check
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.timing import Entrant, time_in_turns
from pallas_kernels.case import Case, Search
from pallas_kernels.offline import resources

WORSE = 1.02  # what the shipped tile may take, relative to the best, and stay


def time_tiles(
    case: Case,
    search: Search,
    inputs: list,
    options: Options,
    device: Callable[[], contextlib.AbstractContextManager],
    errors: Mapping[str, list[float]],
) -> list[dict[str, Any]]:
    """Returns a row for each tile: what it is, microseconds, or why it has none.

    A tile that spilled or did not compile offline is not tried. All others must give
    what the reference gives before they are timed.

    Args:
      case: what to run.
      search: one of its searches.
      inputs: of the case, to take in turn.
      options: of the run.
      device: keeps others off it.
      errors: of `check`; none where the reference did not fit into memory.
    """
    rows, programs = [], {}
    for tile in search.tiles:
        row: dict[str, Any] = {"tile": dataclasses.asdict(tile)}
        rows.append(row)
        if reason := resources.reason_against(case, search, tile):
            row["said"] = reason
        elif time.time() > options.until:
            row["said"] = "no time left"
        else:
            try:
                function = search.function(tile)
                programs[tile] = jax.jit(function).lower(*case.inputs).compile()
            except Exception as error:
                row["said"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    with device():
        by_tile = dict(zip(search.tiles, rows, strict=True))
        _check_and_time(case, inputs, options, programs, by_tile, errors)
    return rows


def _check_and_time(case, inputs, options, programs, by_tile, errors) -> None:
    expected = check.compile_reference(case)(*inputs[0]) if errors else None
    plain = {name: found for name, found in errors.items() if name == "xla"}
    entrants = {}
    for tile, program in programs.items():

        def run(i, program=program):
            return program(*inputs[i % len(inputs)])

        outputs = check.poisoned(lambda run=run: run(0), case.num_bytes)
        said = "right"
        if expected is not None:
            found = {**plain, "tile": check.errors(outputs, expected)}
            said = check.verdict(case, found)["tile"]
        by_tile[tile]["said"] = said
        if said == "right":
            entrants[tile] = Entrant(run, jax.block_until_ready)
    until = time.perf_counter() + options.case_seconds
    rounds = 1 if options.dry else options.rounds
    least = 1e-4 if options.dry else 0.02
    timings = time_in_turns(entrants, rounds=rounds, until=until, measurement_s=least)
    for tile, timing in timings.items():
        by_tile[tile]["us"] = round(1e6 * timing.median_s, 2)


def update_table(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Puts the fastest tiles of what was searched into a table of `tuning`.

    Cases that the table does not tell apart get the tile that is best over all of them.

    Returns:
      The number of entries written.
    """
    table = json.loads(path.read_text()) if path.exists() else {}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        about = {"name": record["name"], "date": record["date"]}
        for search in record.get("searches", ()):
            if any("us" in row for row in search["tiles"]):
                key = json.dumps([search["kernel"], search["call"]])
                groups.setdefault(key, []).append({**about, **search})
    for key, members in groups.items():
        kernel, call = json.loads(key)
        if (best := _best_tile(members)) is None:
            continue
        entry = {
            "when": call,
            "tile": best,
            "microseconds": [_microseconds(r, best) for r in members],
            "cases": [r["name"] for r in members],
            "date": max(r["date"] for r in members)[:10],
        }
        others = [e for e in table.get(kernel, ()) if e["when"] != entry["when"]]
        # The first that fits wins: those that ask for more stand above.
        table[kernel] = sorted([*others, entry], key=lambda e: -len(e["when"]))
    path.write_text(json.dumps(table, indent=1) + "\n")
    return len(groups)


def _best_tile(searches: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the tile of the least time relative to each search's own best."""
    costs = {}
    for row in searches[0]["tiles"]:
        times = [_microseconds(search, row["tile"]) for search in searches]
        if None in times:
            continue
        bests = [min(r["us"] for r in x["tiles"] if "us" in r) for x in searches]
        costs[json.dumps(row["tile"])] = sum(
            t / b for t, b in zip(times, bests, strict=True) if t is not None
        )
    if not costs:
        return None
    best = min(costs, key=lambda text: costs[text])
    shipped = json.dumps(searches[0]["shipped"])
    if shipped in costs and costs[shipped] <= WORSE * costs[best]:
        best = shipped
    return json.loads(best)


def _microseconds(search: Mapping[str, Any], tile: Mapping[str, Any]) -> float | None:
    found = [row.get("us") for row in search["tiles"] if row["tile"] == tile]
    return found[0] if found else None
