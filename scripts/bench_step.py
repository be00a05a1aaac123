# SPDX-License-Identifier: Apache-2.0
"""Times whole training steps on one GPU: each kernel on and off, and torch beside it.

python scripts/bench_step.py [--arms mosaic,torch] [--batch 2] [--output DIR]
    [--predict | --tiny]

Each arm is the same model, batch and update: Llama 3.2 1B at 8192 tokens a row in
bfloat16 with float32 parameters and AdamW, attention kept and the rest of a layer
computed again. Tokens are random, on the device. Arms are processes one after the
other, in two rounds of opposite order, because they do not fit into memory together;
the second round finds its programs in the compilation cache. Written after each arm:
tokens/s, MFU of the data sheet's 989 TFLOP/s, the largest memory in use beside what XLA
predicted, losses, which must agree but for torch's, whose first parameters and tokens
are others, and of some arms where the time of two more steps went. Our first arm also
leaves what XLA knows of the device (target_config.pbtxt).

--predict compiles for an H200 that is not there, for the memory only; it needs
`make .venv/cuda`. --tiny runs all of this on any machine, in seconds, for a test.
"""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import presets

SCRIPTS = Path(__file__).parent
KERNELS: tuple[str, ...] = ("attention", "norm", "cross_entropy")
# cuDNN's gradients, and the fastest of ours, may differ in their last bits each time.
FAST = {"deterministic": "false"}
XLA: Mapping[str, str] = {**dict.fromkeys(KERNELS, "xla"), **FAST}
MOSAIC: Mapping[str, str] = {**dict.fromkeys(KERNELS, "mosaic"), **FAST}
# In the order of their worth, should the time run out. Plain JAX attention has a T x S
# matrix a head: it does not fit with 4 rows.
ARMS: Mapping[str, Mapping[str, str]] = {
    "mosaic": MOSAIC,
    "cudnn": {**XLA, "attention": "cudnn"},
    "torch": {},
    "mosaic, deterministic": {**MOSAIC, "deterministic": "true"},
    "mosaic, but cudnn attention": {**MOSAIC, "attention": "cudnn"},
    "mosaic, but xla norm": {**MOSAIC, "norm": "xla"},
    "mosaic, but xla cross_entropy": {**MOSAIC, "cross_entropy": "xla"},
    "xla": XLA,
}
TINY = ("xla", "torch")
PROFILED = ("mosaic", "torch", "xla")  # ours are compiled once more for it
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "llama_1b": {"remat": "save_attention"},
    "tiny_1m": {"remat": "save_attention", "dtype": "float32"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures."""

    arm: str
    kernels: Mapping[str, str]  # settings of config.kernels
    batch: int  # rows a step
    tiny: bool
    predict: bool
    profile: bool  # afterwards, where its time goes
    steps: int  # a reading of the clock
    readings: int
    preset: str  # of jaxllm.config.presets
    changes: Mapping[str, Any]  # of its fields
    model: Mapping[str, Any]  # the same, as torch reads it


def run_arms(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Runs each arm twice, in opposite orders, and writes what they found so far."""
    names = asked.arms or (TINY if asked.tiny else tuple(ARMS))
    if asked.predict:
        names = [name for name in names if name != "torch"]
    rounds = 1 if asked.predict or asked.tiny else 2
    order = [name for i in range(rounds) for name in list(names)[:: 1 - 2 * (i % 2)]]
    until = time.monotonic() + asked.seconds
    found: list[dict[str, Any]] = []
    for name in order:
        left = until - time.monotonic()
        if left < 20:
            found.append({"arm": name, "failed": "no time left"})
        elif not _hopeless(name, found):
            first = all(row["arm"] != name for row in found)
            profile = first and name in PROFILED
            found.append(_run_arm(name, asked, folder, left, profile=profile))
        print(_line(found[-1]), flush=True)
        _write(found, asked.output / asked.stem)
    return found


def _hopeless(name: str, found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the arm failed in the first round: it would again."""
    return any(row["arm"] == name and "failed" in row for row in found)


def _run_arm(
    name: str,
    asked: argparse.Namespace,
    folder: Path,
    timeout_s: float,
    *,
    profile: bool,
) -> dict[str, Any]:
    preset = "tiny_1m" if asked.tiny else "llama_1b"
    job = Job(
        arm=name,
        kernels=ARMS[name],
        batch=asked.batch,
        tiny=asked.tiny,
        predict=asked.predict,
        profile=profile,
        steps=2 if asked.tiny else 5,
        readings=2 if asked.tiny else 5,
        preset=preset,
        changes=CHANGES[preset],
        model=dataclasses.asdict(getattr(presets, preset)(**CHANGES[preset])),
    )
    script = "bench_step_torch.py" if name == "torch" else "bench_step_jax.py"
    text = json.dumps(dataclasses.asdict(job))
    first = name != "torch" and not (folder / "dump").exists()
    environment = _environment(folder, asked, first=first)
    command = [sys.executable, str(SCRIPTS / script), text]
    try:
        ended = subprocess.run(
            command, env=environment, timeout=timeout_s, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"arm": name, "failed": f"not done in {timeout_s:.0f} s"}
    _keep_device_file(folder, asked.output)
    with (asked.output / f"{asked.stem}.log").open("a") as log:
        log.write(f"=== {name}\n{ended.stdout}{ended.stderr}\n")
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    failed = ""
    if ended.returncode or not lines:
        said = _reason(ended.stdout + ended.stderr)
        failed = f"status {ended.returncode}: {said}"
    if not lines:
        return {"arm": name, "failed": failed}
    # What was measured stands, even if it could not be profiled afterwards.
    extra = {"profile": f"{name} was not profiled: {failed}"} if failed else {}
    return {"arm": name, **json.loads(lines[-1]), **extra}


def _reason(text: str) -> str:
    """Returns the line of a log that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["silent"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines)[-1][:300]


def _environment(folder: Path, asked: argparse.Namespace, first: bool):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), *sys.path]),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    if asked.tiny:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    if asked.predict:
        plugin = [str(SCRIPTS.parent / ".venv" / "cuda"), environment["PYTHONPATH"]]
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(plugin),
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
    elif first and not asked.tiny:
        # XLA writes the device's description beside its dumps.
        (folder / "dump").mkdir()
        flags = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_module_re=.*train_step"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    return environment


def _keep_device_file(folder: Path, output: Path) -> None:
    """Copies what XLA said of the device once, if it has just said so."""
    files = (folder / "dump").glob("*gpu_target_config*")
    if found := sorted(files, key=lambda path: path.stat().st_size):
        shutil.copy(found[-1], output / "target_config.pbtxt")


def summarize(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each arm, from the readings of all its rounds."""
    rows = []
    for name in dict.fromkeys(row["arm"] for row in found):
        mine = [row for row in found if row["arm"] == name]
        good = [row for row in mine if "failed" not in row]
        if not good:
            rows.append(dict(mine[0]))
            continue
        seconds = [s for row in good for s in row.get("step_s", ())]
        row = {**good[0], "step_s": seconds, "rounds": len(good)}
        if seconds:
            median = statistics.median(seconds)
            row["median_step_s"] = median
            row["tokens_per_s"] = row["tokens_a_step"] / median
            row["mfu"] = row["flops_a_step"] / median / row["peak_flops"]
            row["spread"] = (max(seconds) - min(seconds)) / median
        rows.append(row)
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of arms."""
    lines = [
        "| arm | tokens/s | MFU | ms/step | spread | GiB in use | GiB predicted "
        "| loss, first and last step |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['arm']} | {row['failed']} |" + " |" * 6)
            continue
        cells = [row["arm"]]
        if "median_step_s" in row:
            cells += [f"{row['tokens_per_s']:.0f}", f"{100 * row['mfu']:.1f} %"]
            cells += [
                f"{1e3 * row['median_step_s']:.1f}",
                f"{100 * row['spread']:.1f} %",
            ]
        else:
            cells += ["-"] * 4
        for name in ("peak_bytes", "predicted_bytes"):
            value = row.get(name)
            cells.append(f"{value / 2**30:.2f}" if value else "-")
        cells.append(", ".join(f"{loss:.4f}" for loss in row.get("losses", ())) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write(found: Sequence[Mapping[str, Any]], stem: Path) -> None:
    # Of the text of tables there is one an arm, and none in JSON.
    rows = summarize(found)
    tables = [row.pop("profile", None) for row in rows]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"date": date, "command": " ".join(["python", *sys.argv])}
    stem.with_suffix(".json").write_text(json.dumps({**about, "arms": rows}, indent=1))
    text = "\n".join(f"- {name}: {value}" for name, value in about.items())
    device = next((row["device"] for row in rows if "device" in row), "no device")
    parts = [f"# {device}", text, format_rows(rows)]
    parts += [f"```text\n{table}\n```\n" for table in tables if table]
    stem.with_suffix(".md").write_text("\n\n".join(parts))


def _line(row: Mapping[str, Any]) -> str:
    return format_rows(summarize([row])).splitlines()[-1]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--arms", type=lambda text: text.split(";"), help=f"of {'; '.join(ARMS)}")
    add("--batch", type=int, default=2, help="rows of 8192 tokens a step")
    add("--seconds", type=float, default=540, help="after which no arm starts")
    add("--output", type=Path, default=Path("pallas_kernels/bench/results"))
    add("--stem", default="step", help="of the files' names")
    add("--predict", action="store_true", help="compile for a described H200 only")
    add("--tiny", action="store_true", help="a model of kilobytes, on the CPU")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.arms or ()) - set(ARMS):
        parser.error(
            f"no arm {', '.join(sorted(unknown))}; there are {'; '.join(ARMS)}"
        )
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / f"{asked.stem}.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = run_arms(asked, Path(folder))
    print(format_rows(summarize(found)))
    return int(all("failed" in row for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
