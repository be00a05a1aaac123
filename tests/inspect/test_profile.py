# SPDX-License-Identifier: Apache-2.0
"""Where the time of steps went: each instant once, by the part that asked for it."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cluster.phases import Phases
from jaxllm.errors import InputError
from jaxllm.inspect.operations import read_operations
from jaxllm.inspect.profiler import Profiler, trace
from jaxllm.inspect.timeline import format_timeline, share_time
from jaxllm.inspect.traces import OUTSIDE, Event, read_events
from jaxllm.train import train

# As XLA writes a program for GPUs: a matmul in a fusion of Triton, one of our kernels,
# a fusion in a stream of its own, and a collective.
PROGRAM = """HloModule jit_train_step, is_scheduled=true

%gemm (p.1: bf16[8,8]) -> bf16[8,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/jvp()/mlp/TD,DF->TF/dot"}
}

%loop (p.2: bf16[8,8]) -> bf16[8,8] {
  %p.2 = bf16[8,8]{1,0} parameter(0)
  ROOT %add.1 = bf16[8,8]{1,0} add(%p.2, %p.2), metadata={op_name="jit(train_step)/\
transpose(jvp())/checkpoint/rematted_computation/attention/add"}
}

%async (p.3: bf16[8,8]) -> bf16[8,8] {
  %p.3 = bf16[8,8]{1,0} parameter(0)
  ROOT %loop_add_fusion.1 = bf16[8,8]{1,0} fusion(%p.3), kind=kLoop, calls=%loop
}

%kernel (p.5: bf16[8,8]) -> bf16[8,8] {
  %p.5 = bf16[8,8]{1,0} parameter(0)
  ROOT %mpmd_map.6 = bf16[8,8]{1,0} custom-call(%p.5), \
custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(train_step)/jvp()/attention/attention_forward/mpmd"}
}

ENTRY %main (p.4: bf16[8,8]) -> bf16[8,8] {
  %p.4 = bf16[8,8]{1,0} parameter(0)
  %gemm_fusion_dot.7 = bf16[8,8]{1,0} fusion(%p.4), kind=kCustom, calls=%gemm
  %fusion-start.2 = ((bf16[8,8]{1,0}), bf16[8,8]{1,0}) fusion-start(%p.4), calls=%async
  %stacked = bf16[8,8]{1,0} fusion(%p.4), kind=kCustom, calls=%kernel, \
metadata={op_name="jit(train_step)/jvp()/while/body/dynamic_update_slice"}
  %mpmd_map.5 = bf16[8,8]{1,0} custom-call(%p.4), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(train_step)/transpose(jvp())/attention/attention_backward/mpmd"}
  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p.4), \
metadata={op_name="jit(train_step)/optimizer/gather"}
  ROOT %add.9 = bf16[8,8]{1,0} add(%p.4, %p.4), \
metadata={op_name="jit(train_step)/jvp(loss)/add"}
}
"""
OPERATIONS = read_operations(PROGRAM)


def line_of(table: str, *words: str) -> list[str]:
    """Returns the cells of the row that begins with these words."""
    rows = [re.split(r"  +", row) for row in table.splitlines()]
    (found,) = [row for row in rows if tuple(row[: len(words)]) == words]
    return found[len(words) :]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("gemm_fusion_dot.7", "matmul"),
        ("fusion-start.2", "other"),
        ("mpmd_map.5", "kernel"),
        ("stacked", "kernel"),
        ("all-gather-start.1", "communication"),
        ("add.9", "other"),
    ],
)
def test_an_operation_is_of_the_kind_of_what_it_fuses(name, kind):
    assert OPERATIONS[name].kind == kind


def test_a_fusion_is_named_for_what_takes_time_in_it():
    assert OPERATIONS["fusion-start.2"].op_name.endswith("attention/add")
    assert OPERATIONS["stacked"].op_name.endswith("attention_forward/mpmd")


def test_communication_has_only_what_nothing_hides():
    events = [
        Event("gemm_fusion_dot.7", 0, 4e6),
        Event("all-gather-start.1", 2e6, 7e6),
        Event("mpmd_map.5", 8e6, 10e6),
    ]
    timeline = share_time(events, OPERATIONS, num_steps=1)
    assert timeline.busy_s == pytest.approx(
        {"gemm_fusion_dot.7": 4e-3, "all-gather-start.1": 3e-3, "mpmd_map.5": 2e-3}
    )
    assert timeline.hidden_s == pytest.approx(2e-3)
    assert timeline.idle_s == pytest.approx(1e-3)


spans = st.tuples(st.integers(0, 50), st.integers(0, 20), st.sampled_from("abc"))


@given(st.lists(spans, min_size=1))
def test_each_instant_counts_once(drawn):
    events = [Event(name, start, start + length) for start, length, name in drawn]
    timeline = share_time(events, {}, num_steps=1)
    instants = {t for e in events for t in range(int(e.start_ns), int(e.end_ns))}
    assert sum(timeline.busy_s.values()) == pytest.approx(len(instants) / 1e9)
    assert timeline.idle_s >= -1e-15
    assert sum(timeline.runs.values()) == len(events)


def test_a_table_names_part_pass_and_kind_and_adds_up():
    events = [
        Event("gemm_fusion_dot.7", 0, 4e6),
        Event("fusion-start.2", 4e6, 6e6),
        Event("mpmd_map.5", 6e6, 9e6),
        Event("all-gather-start.1", 9e6, 10e6),
        Event(OUTSIDE, 10e6, 11e6),
        Event("nvjet_hsh_128x256", 11e6, 12e6),  # a library's, of a CUDA graph
        Event("ncclDevKernel_AllGather", 12e6, 13e6),
        Event("add.9", 14e6, 16e6),
    ]
    table = format_timeline(share_time(events, OPERATIONS, 2), OPERATIONS, "steps")
    table, _, longest = table.partition("\n\n")
    none = "-"
    assert line_of(table, "mlp", "forward") == ["2.00", "25.0 %", "2.00", *3 * none]
    assert line_of(table, "attention", "forward again")[0] == "1.00"
    assert line_of(table, "attention", "backward")[2:] == [none, "1.50", none, none]
    assert line_of(table, "optimizer")[1:3] == ["0.50", "6.2 %"]
    assert line_of(table, "other programs")[1] == "0.50"
    assert line_of(table, "unnamed")[1:4] == ["0.50", "6.2 %", "0.50"]
    assert line_of(table, "communication")[1] == "0.50"
    assert line_of(table, "loss", "forward")[0] == "1.00"
    assert line_of(table, "idle")[1] == "0.50"
    assert line_of(table, "all")[1:] == [
        "8.00",
        "100.0 %",
        *"2.50 1.50 1.00 2.50".split(),
    ]
    assert line_of(longest, "gemm_fusion_dot.7", "0.5", "2.00")[0] == "mlp forward"


class FakeLine:
    name = "Stream #7(Compute)"

    def __init__(self, *events):
        self.events = [FakeEvent(*event) for event in events]


class FakeEvent:
    def __init__(self, name, start_ns, **stats):
        self.name, self.start_ns, self.duration_ns = name, start_ns, 1.0
        self.stats = stats.items()


def test_kernels_of_a_cuda_graph_are_known_by_their_names(tmp_path, monkeypatch):
    (tmp_path / "a.xplane.pb").write_bytes(b"")
    derived = FakeLine(("XLA Ops", 0))
    derived.name = "XLA Ops"
    graph = dict(hlo_op="command_buffer_147", hlo_module="jit_train_step")
    lines = [FakeLine(), derived]
    lines[0].events = [
        FakeEvent("gemm_fusion_dot_7", 1, **graph),
        FakeEvent("attention_backward_mosaic_gpu_kernel", 2, **graph),
        FakeEvent("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", 2.5, **graph),
        FakeEvent("k", 3, hlo_op="add.9", hlo_module="jit_train_step"),
        FakeEvent("k", 4, hlo_op="add.9", hlo_module="jit_add"),
    ]

    class FakePlane:
        def __init__(self, name, lines):
            self.name, self.lines = name, lines

    class FakeData:
        planes = (FakePlane("/device:GPU:1", []), FakePlane("/device:GPU:0", lines))

        @classmethod
        def from_file(cls, _):
            return cls

    monkeypatch.setattr(jax.profiler, "ProfileData", FakeData)
    events = read_events(tmp_path, "jit_train_step", OPERATIONS)
    assert [event.operation for event in events] == [
        *("gemm_fusion_dot.7", "mpmd_map.5"),
        *("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", "add.9", OUTSIDE),
    ]


def test_a_run_takes_the_steps_apart_that_it_is_told_to(tiny, tmp_path, caplog):
    config = tiny({"steps": 14, "model.remat": "full", "eval.every": 0})
    with caplog.at_level(logging.INFO):
        records = list(train(config, tmp_path / "run", profile_steps=2))
    plain = list(train(config, tmp_path / "plain"))
    losses = [[r["loss"] for r in each if "loss" in r] for each in (records, plain)]
    assert losses[0] == losses[1]
    (said,) = [
        r.getMessage() for r in caplog.records if r.name == "jaxllm.inspect.profiler"
    ]
    text = (tmp_path / "run" / "profile" / "steps-10-11.txt").read_text()
    assert text.strip() in said
    table = text.partition("\n\n")[0]
    passes = ("forward", "forward again", "backward")
    for part in ("attention", "mlp"):
        assert all(float(line_of(table, part, each)[0]) >= 0 for each in passes)
    assert line_of(table, "optimizer")
    shares = [float(s) for s in re.findall(r"([\d.]+) %", table)]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.05 * len(shares))
    assert "models/mlp.py" in text or "models/attention.py" in text
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_who_cannot_trace_says_so_and_goes_on(tmp_path, caplog):
    program = jax.jit(lambda x: x).lower(jnp.ones(1)).compile()
    profiler = Profiler(tmp_path / "a", program, Phases(), first=5, number=1)
    with trace(tmp_path / "of somebody else"):
        profiler.before(5, jnp.ones(1))
        profiler.after(5, jnp.ones(1))
    assert "could not be profiled" in caplog.text


def test_a_trace_that_a_stop_cuts_is_ended_and_said(tmp_path, caplog):
    program = jax.jit(lambda x: x).lower(jnp.ones(1)).compile()
    profiler = Profiler(tmp_path / "a", program, Phases(), first=5, number=3)
    profiler.before(5, jnp.ones(1))
    profiler.close()
    assert "cut short" in caplog.text
    with trace(tmp_path / "b"):  # refused while another one is under way
        pass


@pytest.mark.parametrize("number", [-1, 3])
def test_steps_that_a_run_does_not_have_are_refused(tiny, tmp_path, number):
    config = tiny({"steps": 12})
    with pytest.raises(InputError, match=f"--profile={number} must .* begin with 10"):
        next(train(config, tmp_path / "run", profile_steps=number))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_command_refuses_less_than_no_steps(run_command, tmp_path):
    ended = run_command("train --config c.py --workdir r --profile=-1", tmp_path)
    assert ended.status == 2
    assert "profile" in ended.stderr and "-1" in ended.stderr
