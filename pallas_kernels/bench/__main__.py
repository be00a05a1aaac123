# SPDX-License-Identifier: Apache-2.0
"""Checks and times the kernels on this machine's GPU, beside other libraries.

    python -m pallas_kernels.bench [operation ...] [--part NAME,NAME] [--tune]
        [--seconds N] [--output DIR]

A cheap case of each kind comes first. Of each case: correctness at real shapes, then
the median time, the rate, the share of the ceilings that the same run measures, and the
times of plain JAX, cuDNN and whatever of torch, Tokamax and Liger can be imported;
where our rounds vary by more than 10 %, all of them once more. Results are written
after every case, to `<device>_<date>.json` and `.md`, so a run that is killed loses one
case. A kernel that hangs or crashes costs its own worker process only. `--tune` also
times the tiles that compiled without spills (`python -m
pallas_kernels.offline.resources --tiles`) and rewrites `devices/<device>.json`. `--dry`
runs all of this on tiny shapes on the CPU: it proves the code and measures nothing.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import Record, write_results
from pallas_kernels.bench.search import update_table
from pallas_kernels.bench.supervisor import read_records, supervise
from pallas_kernels.case import OPERATIONS
from pallas_kernels.tuning import DEVICES

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {
    # Several processes share the device, and torch one of them with jax.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONUNBUFFERED": "1",
}


def run(options: Options, workers: int, output: Path) -> int:
    """Measures operations and writes results; returns 1 if any kernel was wrong."""
    folder = Path(options.folder)
    about = _about(options)
    stem = f"{about['device'].lower().replace(' ', '_')}_{about['date'][:10]}"
    stem += "_dry" if options.dry else ""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(supervise, options, i, workers) for i in range(workers)]
        shown: set[tuple[str, str]] = set()
        while True:
            finished = all(future.done() for future in running)
            records = read_records(folder)
            write_results(output, stem, about, records)
            for record in records:
                if (record["operation"], record["name"]) not in shown:
                    shown.add((record["operation"], record["name"]))
                    print(_line(record), flush=True)
            if finished:
                break
            concurrent.futures.wait(running, timeout=2)
        for future in running:
            future.result()
    if options.tune:
        _write_table(about["device"], output, records, options.dry)
    print(f"written: {output / stem}.md and .json")
    return int(any(_is_wrong(record) for record in records))


def _about(options: Options) -> dict[str, Any]:
    """Asks a process of its own, so that this one never holds the device."""
    command = [sys.executable, "-m", "pallas_kernels.bench.machine", options.dumps()]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
    folder = Path(options.folder)
    return {
        **json.loads((folder / "machine.json").read_text()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m pallas_kernels.bench", *options.words()]),
        "operations": list(options.operations),
        "dry": options.dry,
        "ceilings": json.loads((folder / "ceilings.json").read_text()),
    }


def _write_table(device: str, output: Path, records: list[Record], dry: bool) -> None:
    """Writes the table where kernels look it up, and beside the results."""
    name = f"{device.lower().replace(' ', '_')}.json"
    shipped = DEVICES / name
    copy = output / name
    copy.write_text(shipped.read_text() if shipped.exists() else "{}")
    written = update_table(copy, records)
    if not dry:
        shipped.write_text(copy.read_text())
    print(f"{written} entries of tiles written to {copy}")


def _is_wrong(record: Record) -> bool:
    ours = record.get("verdict", {}).get("mosaic", "right")
    return ours != "right" or "mosaic" in record.get("failures", {})


def _line(record: Record) -> str:
    times = ", ".join(
        f"{name} {timing['median_us']:.1f}"
        for name, timing in record.get("timings", {}).items()
    )
    said = record.get("verdict", {}).get("mosaic", "not checked")
    share = record.get("share")
    return (
        f"{record['operation']} {record['name']}: {times or 'no times'} us; "
        f"share {share and round(share, 3)}; {said} {record.get('failures') or ''}"
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument
    add("operations", nargs="*", help=f"of {', '.join(OPERATIONS)}; none: all")
    add("--part", default="", help="only cases whose name contains this, or this,that")
    add("--tune", action="store_true", help="time other tiles too, write the table")
    add("--seconds", type=float, default=540, help="after which no case starts")
    add("--case_seconds", type=float, default=3, help="of timing a case at most")
    add("--rounds", type=int, default=9, help="measurements of each implementation")
    add("--workers", type=int, default=0, help="processes; 0: a fourth of the cores")
    add("--no_peers", action="store_true", help="time plain JAX and ours only")
    add("--output", type=Path, help="folder of the results")
    add("--dry", action="store_true", help="tiny shapes on the CPU; needs --output")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.operations) - set(OPERATIONS):
        parser.error(f"no operation {', '.join(sorted(unknown))}")
    if asked.dry and asked.output is None:
        parser.error("--dry needs --output: its times must not be among the results")
    workers = asked.workers or min(max((os.cpu_count() or 4) // 4, 1), 4)
    os.environ.update(ENVIRONMENT, XLA_PYTHON_CLIENT_MEM_FRACTION=f"{0.9 / workers}")
    if asked.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            operations=tuple(asked.operations) or OPERATIONS,
            part=asked.part,
            tune=asked.tune,
            dry=asked.dry,
            peers=not asked.no_peers,
            rounds=asked.rounds,
            case_seconds=asked.case_seconds,
            until=time.time() + asked.seconds,
            folder=folder,
        )
        return run(options, workers, asked.output or RESULTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
