# SPDX-License-Identifier: Apache-2.0
"""Several processes train what one trains, stop together and fail together."""

import json
from pathlib import Path

from jaxllm.checkpoint import find_steps

ASKS_PROCESS_ONE = """
import os, signal
from jaxllm.run.run import Run

next_batch = Run.next_batch

def next_batch_asked(self, step, should_stop):
    if step == 5 and os.environ["JAXLLM_PROCESS_ID"] == "1":  # it does not lead
        os.kill(os.getpid(), signal.SIGTERM)
    return next_batch(self, step, should_stop)

Run.next_batch = next_batch_asked
"""


def records(folder: Path) -> dict[tuple[int, bool], dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], "eval_loss" in line): line for line in lines}


def test_two_processes_stop_together_and_one_goes_on_as_if_alone(
    tiny, tmp_path, start_processes
):
    # Both processes need the same rows. Two devices, because two terms have one sum in
    # any order: those of more differ in their last bit between gloo and one process.
    settings = {"mesh.fsdp": 1, "mesh.tensor": 2, "steps": 30, "checkpoint.every": 25}
    config = tiny(settings | {"eval.every": 0})
    alone = start_processes(config, tmp_path, 1, 2, "alone")
    assert alone.wait() == [0], alone.said(0)
    asked = ASKS_PROCESS_ONE
    pair = start_processes(config, tmp_path, 2, 1, "pair", preamble=asked)
    assert pair.wait() == [75, 75], pair.said(0) + pair.said(1)
    assert find_steps(tmp_path / "pair" / "checkpoints")[0] == [7]  # an answer is late
    rest = start_processes(config, tmp_path, 1, 2, "pair")
    assert rest.wait() == [0], rest.said(0)
    one, many = records(tmp_path / "alone"), records(tmp_path / "pair")
    assert one.keys() == many.keys()
    assert [s for s in one if one[s]["loss"] != many[s]["loss"]] == []
    assert [s for s in one if one[s]["grad_norm"] != many[s]["grad_norm"]] == []


def test_what_the_leading_process_refuses_ends_all_of_them(
    tiny, tmp_path, start_processes
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    pair = start_processes(tiny({"eval.every": 0}), tmp_path, 2, 1, "taken")
    assert pair.wait() == [2, 2]
    for index in range(2):
        assert "has files but no run" in pair.said(index)
        assert "Traceback" not in pair.said(index)
