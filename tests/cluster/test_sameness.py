# SPDX-License-Identifier: Apache-2.0
"""Processes with other settings, tokens or code than the others refuse to train."""

import shutil

import numpy as np
import pytest

from jaxllm import tokenize
from jaxllm.cluster import sameness
from jaxllm.cluster.sameness import describe_difference

BOTH = {"config.seed": "0", "jax": "0.12", "the training tokens": ["ab" * 32]}


def test_processes_that_have_the_same_facts_do_not_differ():
    assert describe_difference([BOTH, BOTH, dict(reversed(BOTH.items()))]) == ""


def test_what_differs_is_named_with_the_processes_that_have_each_value():
    others = [BOTH, BOTH | {"config.seed": "7"}, BOTH | {"jax": "0.11"}, BOTH]
    assert describe_difference(others) == (
        "config.seed: 0 in processes 0 2 3, 7 in process 1; "
        "jax: 0.12 in processes 0 1 3, 0.11 in process 2"
    )


def test_long_values_that_begin_alike_do_not_look_alike():
    one, other = (["ab" * 32, end * 32] for end in ("ab", "cd"))
    said = describe_difference([BOTH | {"tokens": one}, BOTH | {"tokens": other}])
    first, second = said.removeprefix("tokens: ").split(" in process 0, ")
    assert first != second.removesuffix(" in process 1")


def test_a_fact_that_only_some_know_differs():
    assert describe_difference([BOTH, BOTH | {"config.new": "1"}]) == (
        "config.new: null in process 0, 1 in process 1"
    )


def test_a_thousand_differences_are_one_short_message():
    facts = [{f"name{n}": n * process for n in range(1000)} for process in range(999)]
    assert len(describe_difference(facts)) < 20_000


def test_texts_of_different_lengths_are_gathered_whole(monkeypatch):
    texts = ["{}", '{"a": "\u00e9"}', "{}"]

    def gather(mine: np.ndarray) -> np.ndarray:
        """Stands in for JAX: all processes, of which this one is the first."""
        if len(mine) == len(sameness._hash(b"")) + 4:
            encoded = (text.encode() for text in texts)
            rows = [sameness._hash(e).encode() + len(e).to_bytes(4) for e in encoded]
        else:
            rows = [text.encode().ljust(len(mine)) for text in texts]
        return np.stack([np.frombuffer(row, np.uint8) for row in rows])

    monkeypatch.setattr(sameness.multihost_utils, "process_allgather", gather)
    assert sameness._gather(texts[0]) == texts


def test_the_same_tokens_may_have_another_path_on_another_host(tiny):
    one, other = (tiny({"data.paths": (f"/{host}/tokens",)}) for host in "ab")
    assert sameness._settings(one) == sameness._settings(other)
    assert "config.data.weights" in sameness._settings(one)


OTHER_CODE_IN_PROCESS_ONE = """
import os
from jaxllm.cluster import sameness
if os.environ["JAXLLM_PROCESS_ID"] == "1":
    sameness._source_hash = lambda: "mended"
"""
PAIR = {"steps": 4, "mesh.fsdp": 2, "checkpoint.every": 2}


def test_other_settings_tokens_or_code_in_one_process_end_all_of_them(
    tiny, tmp_path, start_processes
):
    (tmp_path / "other.txt").write_text("other tokens of the same tokenizer " * 99)
    other = str(tmp_path / "other")
    flags = f"--input={tmp_path}/other.txt --output={other} --workers=1 --holdout=0.1"
    assert tokenize.main(["tokenize", *flags.split(), "--holdout_by=tail"]) == 0
    settings = ("optimizer.lr=1.0", "model.d_ff=48", f"data.paths={other}")
    pair = start_processes(
        *(tiny(PAIR), tmp_path, 2, 1, "run"),
        preamble=OTHER_CODE_IN_PROCESS_ONE,
        more_flags={1: [f"--config.{each}" for each in settings]},
    )
    assert pair.wait() == [2, 2], pair.said(0) + pair.said(1)
    assert not (tmp_path / "run").exists()
    first, second = (pair.said(index).strip().splitlines()[-1] for index in range(2))
    assert first == second and first.startswith("error: the processes of a run must")
    for difference in (
        "config.model.d_ff: 32 in process 0, 48 in process 1;",
        "config.optimizer.lr: 0.01 in process 0, 1.0 in process 1;",
        "the held-out tokens: ",
        "the source code of jaxllm: ",
        "the training tokens: ",
    ):
        assert difference in first
    assert first.count(" in process 1") == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "named"),
    [
        ("evaluate", ["--step=4"], "--step: latest in process 0, 4 in process 1"),
        ("replay", ["--batch=2"], "--batch: null in process 0, 2 in process 1"),
    ],
)
def test_processes_that_look_at_other_steps_end_all(
    command, flags, named, tiny, trained, tmp_path, start_processes
):
    shutil.copytree(trained, tmp_path / "run")
    both = {"evaluate": [], "replay": ["--step=3"]}[command]
    pair = start_processes(
        *(tiny({"mesh.fsdp": 2}), tmp_path, 2, 1, "run"),
        python=("-m", f"jaxllm.{command}"),
        more_flags={0: both, 1: [*both, *flags]},
    )
    assert pair.wait() == [2, 2], pair.said(0) + pair.said(1)
    assert all(f"differ: {named}." in pair.said(index) for index in range(2))
