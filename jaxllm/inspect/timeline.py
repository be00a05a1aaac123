# SPDX-License-Identifier: Apache-2.0
"""Where the time of steps went, by part of the model, from a trace of a device.

Each instant counts once. Where several operations run at one time they share it, but
communication has only what nothing else hides: the parts add up to the time of a step.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import sharding
from jaxllm.inspect.operations import Operation
from jaxllm.inspect.traces import OUTSIDE, Event

# Scopes of the model and of the step: `jax.named_scope`.
PARTS = (
    "embedding",
    "attention",
    "mlp",
    "router",
    "experts",
    "shared_experts",
    "final_norm",
    "loss",
    "optimizer",
)
KINDS = ("matmul", "kernel", "communication", "other")
SHOWN = 15  # operations
_WRAPPED = re.compile(r"^(?:\w+\()*([\w.]*)\)*$")  # "transpose(jvp(loss))"


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Seconds of the steps that were traced.

    Attributes:
      num_steps: that were traced.
      total_s: from the first operation's beginning to the last one's end.
      busy_s: of each operation, what is its own.
      hidden_s: of communication behind other operations, besides.
      runs: of each operation.
    """

    num_steps: int
    total_s: float
    busy_s: Mapping[str, float]
    hidden_s: float
    runs: Mapping[str, int]

    @property
    def idle_s(self) -> float:
        """Seconds in which the device did nothing."""
        return self.total_s - sum(self.busy_s.values())


def share_time(
    events: Sequence[Event],
    operations: Mapping[str, Operation],
    num_steps: int,
) -> Timeline:
    """Divides each instant among the operations that ran in it."""
    some = [
        (i, event) for i, event in enumerate(events) if event.end_ns > event.start_ns
    ]
    moments = sorted(  # ends before beginnings
        [(event.start_ns, 1, i) for i, event in some]
        + [(event.end_ns, 0, i) for i, event in some]
    )
    busy_ns: dict[str, float] = collections.defaultdict(float)
    running: set[int] = set()
    before_ns = hidden_ns = 0.0
    for now_ns, begins, i in moments:
        names = [events[k].operation for k in running]
        moves = [n for n in names if _kind(n, operations) == "communication"]
        works = [name for name in names if name not in moves]
        for name in works or moves:
            busy_ns[name] += (now_ns - before_ns) / len(works or moves)
        hidden_ns += now_ns - before_ns if works and moves else 0
        (running.add if begins else running.discard)(i)
        before_ns = now_ns
    total_ns = moments[-1][0] - moments[0][0] if moments else 0.0
    return Timeline(
        num_steps=num_steps,
        total_s=total_ns / 1e9,
        busy_s={name: ns / 1e9 for name, ns in busy_ns.items()},
        hidden_s=hidden_ns / 1e9,
        runs=collections.Counter(event.operation for event in events),
    )


def format_timeline(
    timeline: Timeline, operations: Mapping[str, Operation], title: str
) -> str:
    """Returns a table of the parts of a step, and one of its longest operations."""
    steps_ms = 1e3 / timeline.num_steps
    whole_s = timeline.total_s or 1.0
    parts: dict[tuple[str, str], dict[str, float]] = {}
    for name, seconds in timeline.busy_s.items():
        kinds = parts.setdefault(_place(name, operations), dict.fromkeys(KINDS, 0.0))
        kinds[_kind(name, operations)] += seconds

    def line(first: str, second: str, seconds: float, kinds: Iterable[float]):
        numbers = (f"{each * steps_ms:.2f}" if each else "-" for each in kinds)
        share = f"{100 * seconds / whole_s:.1f} %"
        return [first, second or "-", f"{seconds * steps_ms:.2f}", share, *numbers]

    rows = sorted(parts.items(), key=lambda item: -sum(item[1].values()))
    body = [line(*place, sum(k.values()), k.values()) for place, k in rows]
    sums = [sum(kinds[kind] for _, kinds in rows) for kind in KINDS]
    body.append(line("idle", "", timeline.idle_s, [0.0] * len(KINDS)))
    body.append(line("all", "", timeline.total_s, sums))
    header = ["part", "pass", "ms", "share", *KINDS]
    hidden = f"communication hidden behind the rest: {timeline.hidden_s * steps_ms:.2f}"
    longest = sorted(timeline.busy_s.items(), key=lambda item: -item[1])[:SHOWN]
    lines = []
    for name, seconds in longest:
        times = f"{timeline.runs[name] / timeline.num_steps:g}"
        what = operations.get(name)
        asked = "" if what is None else what.source or "/".join(_tail(what.op_name))
        place = " ".join(filter(None, _place(name, operations)))
        lines.append([name, times, f"{seconds * steps_ms:.2f}", place, asked])
    return "\n".join(
        [
            sharding.format_table(f"{title}, ms a step", header, body),
            f"{hidden} ms",
            "",
            sharding.format_table(
                "its longest operations",
                ["operation", "times", "ms", "part", "asked for by"],
                lines,
            ),
        ]
    )


def _place(name: str, operations: Mapping[str, Operation]) -> tuple[str, str]:
    """Returns the part of a step and the pass of an operation."""
    if name == OUTSIDE:
        return "other programs", ""
    if name not in operations:
        kind = _kind(name, operations)
        return ("communication", "") if kind == "communication" else ("unnamed", "")
    path = operations[name].op_name.split("/")
    scopes = [match[1] for match in map(_WRAPPED.match, path) if match]
    part = next((scope for scope in reversed(scopes) if scope in PARTS), "")
    joined = operations[name].op_name
    if "rematted_computation" in joined:
        return part or "layers", "forward again"
    if "transpose(" in joined:
        return part or "layers", "backward"
    if "jvp(" in joined:
        return part or "layers", "forward"
    return part or "rest", ""


def _kind(name: str, operations: Mapping[str, Operation]) -> str:
    """Returns one of KINDS: by the name if that is of no instruction, but a kernel."""
    if name in operations:
        return operations[name].kind
    named = name.lower()
    if "nccl" in named:
        return "communication"
    is_matmul = any(part in named for part in ("gemm", "cutlass", "nvjet"))
    return "matmul" if is_matmul and name != OUTSIDE else "other"


def _tail(op_name: str) -> list[str]:
    return op_name.split("/")[-2:]
