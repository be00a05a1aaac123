# SPDX-License-Identifier: Apache-2.0
"""The table of tiles: what is looked up, and that what is shipped can be."""

import json

import pytest

from pallas_kernels import tuning
from pallas_kernels.target import Target

CHIP = Target("gpu", "NVIDIA X1", 1)
ENTRIES = [
    {"when": {"head_dim": 128, "causal": True}, "tile": {"block_q": 1}},
    {"when": {"head_dim": 128}, "tile": {"block_q": 2}},
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    (tmp_path / "nvidia_x1.json").write_text(json.dumps({"attention": ENTRIES}))
    monkeypatch.setattr(tuning, "DEVICES", tmp_path)
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


@pytest.mark.parametrize(
    ("call", "tile"),
    [
        ({"head_dim": 128, "causal": True}, {"block_q": 1}),
        ({"head_dim": 128, "causal": False, "more": 1}, {"block_q": 2}),
        ({"head_dim": 64, "causal": True}, {}),
        ({}, {}),
    ],
)
def test_the_first_entry_that_fits_wins(table, call, tile):
    assert tuning.look_up(CHIP, "attention", call) == tile


def test_a_kernel_or_a_device_without_entries_has_no_tile(table):
    call = {"head_dim": 128}
    assert tuning.look_up(CHIP, "norm", call) == {}
    assert tuning.look_up(Target("gpu", "NVIDIA X2", 1), "attention", call) == {}


def test_the_shipped_tables_have_entries_of_the_described_form():
    for path in tuning.DEVICES.glob("*.json"):
        if path.stem.endswith("_resources"):
            continue
        for kernel, entries in json.loads(path.read_text()).items():
            for entry in entries:
                assert {"when", "tile", "date"} <= set(entry), kernel
