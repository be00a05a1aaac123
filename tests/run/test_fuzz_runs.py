# SPDX-License-Identifier: Apache-2.0
"""A small share of what scripts/fuzz_runs.py does in minutes, with a fixed seed."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_runs.py"

# Where an array is broken, threads of TensorStore call an event loop that Orbax has
# closed, and nobody can catch that.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def fuzz_runs():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("fuzz_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_runs"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject(fuzz_runs, tmp_path_factory):
    return fuzz_runs.make_subject(tmp_path_factory.mktemp("fuzz"))


def test_a_damaged_run_is_read_as_it_was_saved_or_refused(fuzz_runs, subject):
    logging.disable()
    try:
        assert list(fuzz_runs.fuzz(subject, 40, 0)) == []
    finally:
        logging.disable(logging.NOTSET)


def test_a_wrong_number_would_be_found(fuzz_runs, subject, monkeypatch):
    """Without checksums some damages are read as if they were saved."""
    monkeypatch.setattr("jaxllm.checkpoint.reading._compare", lambda *args: None)
    damage = fuzz_runs.Damage("flip", (Path("run", "checkpoints", "6"),))
    arrays = max(
        (subject.home / "run/checkpoints/6/state").rglob("*"),
        key=lambda path: path.stat().st_size,
    )
    before = arrays.read_bytes()
    flipped = bytearray(before)
    flipped[len(flipped) // 2] ^= 1
    arrays.write_bytes(flipped)
    assert fuzz_runs._read_all(subject, damage) == ["step 6 is not what was saved"]
    arrays.write_bytes(before)
