# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own code, on cases of milliseconds: its times mean nothing here."""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import check, peers, search
from pallas_kernels.bench import measure as measuring
from pallas_kernels.bench.machine import Ceilings, measure_ceilings
from pallas_kernels.bench.measure import DeviceLost, measure
from pallas_kernels.bench.options import Options
from pallas_kernels.bench.record import format_results, write_results
from pallas_kernels.bench.supervisor import read_records, supervise
from pallas_kernels.bench.timing import Entrant, Timing, time_in_turns
from pallas_kernels.bench.worker import in_order, one_of_each_kind
from pallas_kernels.case import OPERATIONS, Case, Search, draw_normal, find_cases


@dataclasses.dataclass(frozen=True)
class Tile:
    rows: int


def scale(x, *, by: float = 2.0):
    return x * jnp.asarray(by, x.dtype)


def make_case(**changes) -> Case:
    fields: dict[str, Any] = dict(
        operation="scale",
        name="forward-64",
        functions={"mosaic": scale, "xla": scale},
        inputs=(jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),),
        flops=64.0 * 64,
        num_bytes=4.0 * 64 * 64,
        tile=Tile(8),
        make_inputs=lambda key: (draw_normal(key, (64, 64), jnp.bfloat16),),
        searches=(
            Search(
                kernel="scale",
                call={"width": 64},
                tiles=(Tile(8), Tile(16)),
                shipped=Tile(8),
                function=lambda tile: functools.partial(scale, by=2.0),
            ),
        ),
    )
    return Case(**fields | changes)


@pytest.fixture
def options(tmp_path) -> Options:
    rates = {"flops_per_s": 1e9, "bytes_per_s": 1e9, "launch_s": 1e-5}
    (tmp_path / "ceilings.json").write_text(json.dumps(rates))
    return Options(
        dry=True, case_seconds=0.1, until=time.time() + 300, folder=str(tmp_path)
    )


def test_a_proof_has_errors_a_verdict_and_compares_the_bits_of_two_runs():
    found = check.prove(make_case(), dry=True)
    assert found["verdict"] == {"mosaic": "right"}
    assert found["same_bits"] == {"mosaic": True, "xla": True}
    assert found["errors"]["mosaic"] == found["errors"]["xla"]


def test_a_record_has_times_errors_and_a_verdict(options):
    record = measure(make_case(), options)
    assert record["failures"] == {}
    assert record["verdict"] == {"mosaic": "right"}
    assert set(record["timings"]) == {"mosaic", "xla"}
    assert record["timings"]["mosaic"]["median_us"] > 0
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("num_bytes", "calls"), [(1e9, 2), (3e9, 1)])
def test_short_calls_share_a_program_and_each_has_inputs_of_its_own(
    options, num_bytes, calls
):
    seen = set()

    def spy(x):
        seen.add(id(x))
        return scale(x)

    functions = {"mosaic": spy, "xla": scale}
    record = measure(make_case(functions=functions, num_bytes=num_bytes), options)
    assert record["calls_a_program"] == len(seen) == calls


@pytest.mark.parametrize(
    "wrong",
    [
        functools.partial(scale, by=2.1),
        lambda x: scale(x).at[0, 0].set(jnp.nan),
        lambda x: scale(x).at[0, 0].set(jnp.inf),
    ],
)
def test_a_kernel_that_is_wrong_is_said_to_be(options, wrong):
    record = measure(make_case(functions={"mosaic": wrong, "xla": scale}), options)
    assert "error" in record["verdict"]["mosaic"]
    assert command._is_wrong(record)


def test_our_own_kernel_is_noted_before_the_others_run(options):
    noted = []
    record = measure(make_case(), options, lambda *said: noted.append(said))
    assert [(event, set(early["timings"])) for event, early in noted] == [
        ("waits", set()),
        ("holds", set()),
        ("holds", {"mosaic"}),
    ]
    assert set(record["timings"]) == {"mosaic", "xla"}


def test_an_implementation_that_raises_leaves_the_others_measured(options):
    def broken(x):
        raise NotImplementedError("head width 65")

    functions = {"mosaic": scale, "cudnn": broken, "xla": scale}
    record = measure(make_case(functions=functions), options)
    assert "head width 65" in record["failures"]["cudnn"]
    assert set(record["timings"]) == {"mosaic", "xla"}


def test_a_fault_of_the_device_ends_the_case_with_what_is_known(options):
    def faulty(x):
        raise RuntimeError(
            "INTERNAL: CUDA_ERROR_MISALIGNED_ADDRESS: misaligned address"
        )

    with pytest.raises(DeviceLost) as lost:
        measure(make_case(functions={"mosaic": faulty, "xla": scale}), options)
    (record,) = lost.value.args
    assert set(record["failures"]) == {"mosaic"} and record["timings"] == {}


def test_a_full_device_is_no_fault(options):
    def large(x):
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")

    functions = {"mosaic": scale, "xla": large}
    record = measure(make_case(functions=functions, reference=scale), options)
    assert set(record["timings"]) == {"mosaic"} and set(record["failures"]) == {"xla"}


def test_of_two_times_the_one_that_varies_less_stays(options, monkeypatch):
    spreads = iter([0.0, 0.9, 0.2])  # ours alone; all, disturbed; all once more

    def times(entrants, *, rounds, **_):
        spread = next(spreads)
        timing = Timing(1.0, 1.0 - spread / 2, 1.0 + spread / 2, rounds)
        return dict.fromkeys(entrants, timing)

    monkeypatch.setattr(measuring, "time_in_turns", times)
    monkeypatch.setattr(measuring._Work, "is_disturbed", lambda work: True)
    record = measure(make_case(), options)
    assert record["timings"]["xla"]["high_us"] == pytest.approx(1.1e6)


def test_the_reference_of_a_case_stands_in_for_plain_jax_that_does_not_fit(options):
    case = make_case(functions={"mosaic": scale}, reference=scale)
    assert measure(case, options)["verdict"] == {"mosaic": "right"}


def test_the_first_run_takes_the_cheapest_case_of_each_kind():
    forward = make_case(name="forward-8k", flops=1e15)
    cases = [forward, make_case(), make_case(name="backward-64")]
    assert {case.name for case in one_of_each_kind(cases)} == {
        "forward-64",
        "backward-64",
    }


def test_equal_infinities_are_no_error():
    x = jnp.array([1.0, -jnp.inf])
    assert check.errors(x, [x]) == [0.0]
    assert not check.errors(x, [jnp.array([1.0, 2.0])])[0] < 1


def test_a_backward_pass_may_err_three_times_as_much_and_a_forward_pass_twice():
    found = {"xla": [1e-3], "mosaic": [2.5e-3]}
    assert check.verdict(make_case(name="backward-64"), found)["mosaic"] == "right"
    assert check.verdict(make_case(), found)["mosaic"] != "right"


def test_times_are_per_call_and_taken_in_turns():
    order = []

    def entrant(name: str, seconds: float, calls: int = 1) -> Entrant:
        def run(_):
            order.append(name)
            time.sleep(seconds)

        return Entrant(run, lambda _: None, calls)

    entrants = {"one": entrant("one", 1e-2), "four": entrant("four", 4e-2, 4)}
    found = time_in_turns(
        entrants, rounds=3, until=time.perf_counter() + 60, measurement_s=5e-3
    )
    assert found["one"].rounds == 3
    assert 1e-2 <= found["four"].median_s < 4e-2
    # After the warm-up: rounds of both, whoever was last goes first.
    turns = [name for i, name in enumerate(order) if name != ["", *order][i]]
    assert turns[2:] == ["one", "four", "one", "four"][: len(turns) - 2]


def test_no_round_starts_after_the_deadline():
    nothing = Entrant(lambda _: None, lambda _: None)
    found = time_in_turns({"a": nothing}, rounds=50, until=0, measurement_s=1e-6)
    assert found["a"].rounds == 1


def test_results_keep_cases_that_this_run_did_not_measure(options, tmp_path):
    record = measure(make_case(), options)
    about = {"device": "NVIDIA X", "dry": True}
    write_results(tmp_path, "x", about, [{**record, "name": "forward-old"}])
    write_results(tmp_path, "x", about, [record])
    document = json.loads((tmp_path / "x.json").read_text())
    assert [r["name"] for r in document["cases"]] == ["forward-old", "forward-64"]
    text = (tmp_path / "x.md").read_text()
    assert "forward-64" in text and "times mean nothing" in text


def test_a_backward_pass_is_both_passes_less_the_forward_one():
    def record(name: str, flops: float, us: float):
        timings = {"mosaic": {"median_us": us, "low_us": us, "high_us": us}}
        facts = {"operation": "scale", "name": name, "num_bytes": 1.0}
        return {**facts, "flops": flops, "timings": timings}

    cases = [record("forward-8k", 1e9, 10.0), record("forward-backward-8k", 3e9, 30.0)]
    text = format_results({"device": "X", "dry": False, "cases": cases})
    assert "- 8k: mosaic 20 us, 100 TFLOP/s" in text


def test_a_case_without_times_is_in_the_table_with_its_reason():
    failed = {"operation": "scale", "name": "a", "failures": {"mosaic": "killed"}}
    text = format_results({"device": "X", "dry": False, "cases": [failed]})
    assert "| a | - |" in text and "- a, mosaic: killed" in text


def test_every_operation_has_its_turn_before_any_has_all_of_its_cases(options):
    options = dataclasses.replace(options, operations=("norm", "quantize"), dry=False)
    cases = in_order(options)
    assert [c.operation for c in cases[:4]] == ["norm", "quantize"] * 2
    assert len(cases) == sum(len(find_cases(o)) for o in options.operations)
    only = dataclasses.replace(options, part="rms-8k-8192,rows-16384x4096-both")
    assert [c.name for c in in_order(only)] == [
        "forward-rms-8k-8192",
        "rows-16384x4096-both",
        "backward-rms-8k-8192",
    ]


WORKER = """
import json, os, sys, time
options, first, stride = sys.argv[1:]
folder = json.loads(options)["folder"]
path = os.path.join(folder, f"worker-{first}.jsonl")
seen = open(path).read() if os.path.exists(path) else ""
with open(path, "a", buffering=1) as file:
    def write(event, name, **facts):
        about = {"operation": "x", "name": name, "at": time.time()}
        print(json.dumps({"event": event, **about, **facts}), file=file)
    for name in ("crashes", "faults", "hangs", "ends"):
        if name in seen:
            continue
        write("began", name)
        if name == "crashes":
            os.kill(os.getpid(), 11)
        if name == "faults":
            write("done", name, failures={"mosaic": "fault"})
            os._exit(3)
        if name == "hangs":
            write("holds", name, timings={"mosaic": 1})
            time.sleep(600)
        write("waits", name)
        time.sleep(0.5)
        write("done", name)
"""


def test_a_crash_a_fault_and_a_hang_cost_their_case_only(options, tmp_path):
    started = (sys.executable, "-c", WORKER)
    limits_s = {"began": 60, "holds": 1}
    supervise(options, 0, 1, command=started, limits_s=limits_s)
    found = {record["name"]: record for record in read_records(tmp_path)}
    assert list(found) == ["crashes", "faults", "hangs", "ends"]
    assert found["faults"]["failures"] == {"mosaic": "fault"}
    assert "exit status -11" in found["crashes"]["failures"]["mosaic"]
    # Our own kernel was measured before another implementation hung.
    assert "killed" in found["hangs"]["failures"]["others"]
    assert found["hangs"]["timings"] == {"mosaic": 1}
    assert "failures" not in found["ends"]


def test_tiles_are_timed_and_the_best_is_written(options, tmp_path):
    options = dataclasses.replace(options, tune=True)
    record = measure(make_case(), options)
    (found,) = record["searches"]
    assert [row["said"] for row in found["tiles"]] == ["right", "right"]
    path = tmp_path / "table.json"
    assert search.update_table(path, [record]) == 1
    (entry,) = json.loads(path.read_text())["scale"]
    assert entry["when"] == {"width": 64}
    assert entry["tile"] in ({"rows": 8}, {"rows": 16})


def tuned(call, times, name="a"):
    rows = [{"tile": {"rows": rows}, "us": us} for rows, us in times.items()]
    date = "2026-01-02T00:00:00+00:00"
    search = dict(kernel="scale", call=call, shipped={"rows": 8}, tiles=rows)
    return {"name": name, "searches": [search], "date": date}


def test_the_shipped_tile_stays_unless_another_is_clearly_better(tmp_path):
    path = tmp_path / "table.json"
    search.update_table(path, [tuned({"width": 64}, {8: 100.0, 16: 99.0})])
    assert json.loads(path.read_text())["scale"][0]["tile"] == {"rows": 8}
    search.update_table(path, [tuned({"width": 64}, {8: 100.0, 16: 90.0})])
    (entry,) = json.loads(path.read_text())["scale"]
    assert entry["tile"] == {"rows": 16} and entry["date"] == "2026-01-02"


def test_cases_that_the_table_cannot_tell_apart_get_one_tile(tmp_path):
    path = tmp_path / "table.json"
    records = [
        tuned({}, {8: 100.0, 16: 50.0}, "short"),
        tuned({}, {8: 100.0, 16: 110.0}, "long"),
        tuned({"width": 64}, {8: 1.0}, "special"),
    ]
    search.update_table(path, records)
    special, general = json.loads(path.read_text())["scale"]
    assert special["when"] == {"width": 64}
    assert general["tile"] == {"rows": 16}
    assert general["cases"] == ["short", "long"]


def test_a_share_is_of_the_nearer_ceiling():
    ceilings = Ceilings(flops_per_s=100.0, bytes_per_s=10.0, launch_s=0.0)
    assert ceilings.share(flops=50, num_bytes=1, seconds=1) == 0.5
    assert ceilings.share(flops=50, num_bytes=9, seconds=1) == 0.9


def test_ceilings_are_positive():
    found = measure_ceilings(width=16, copied_bytes=1024)
    assert min(dataclasses.astuple(found)) > 0


def test_libraries_that_are_not_there_are_absent_and_say_so(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    peers.versions.cache_clear()
    assert set(peers.versions()) == set(peers.LIBRARIES)
    assert all("absent" in version for version in peers.versions().values())
    assert peers.jax_peers(make_case(operation="attention")) == {}
    assert peers.torch_peers(make_case(operation="attention"), []) == {}
    peers.versions.cache_clear()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_tiny_cases_for_a_dry_run(operation):
    assert [case.operation for case in find_cases(operation, tiny=True)]


@pytest.mark.slow
def test_a_dry_run_goes_through_everything_and_writes_what_it_found(tmp_path):
    options = ["--dry", "--workers=1", "--case_seconds=0.1", f"--output={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.bench", "quantize", *options],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = tmp_path.glob("*_dry.json")
    document = json.loads(path.read_text())
    assert document["jax"] == jax.__version__ and document["dry"]
    assert len(document["cases"]) == len(find_cases("quantize", tiny=True))
    for record in document["cases"]:
        assert record["verdict"] == {"mosaic": "right"}, record


def test_a_dry_run_must_not_write_among_the_results(capsys):
    with pytest.raises(SystemExit):
        command.main(["--dry"])
    assert "--output" in capsys.readouterr().err


def test_an_unknown_operation_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["atention", "--dry"])
    assert "atention" in capsys.readouterr().err
