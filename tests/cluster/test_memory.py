# SPDX-License-Identifier: Apache-2.0
"""The memory that there is, and a refusal that names it."""

import pytest

from jaxllm.cluster.memory import check_room, host_bytes, show_bytes
from jaxllm.errors import InputError


def test_a_container_has_less_than_its_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    assert host_bytes(tmp_path, tmp_path) == 8_192_000
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes(tmp_path, tmp_path) == 8_192_000
    (tmp_path / "memory.max").write_text("5000000\n")
    assert host_bytes(tmp_path, tmp_path) == 2_000_000
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500000\n")
    assert host_bytes(tmp_path, tmp_path) == 2_500_000


def test_this_machine_has_some():
    assert host_bytes() > 0


def test_what_does_not_fit_is_refused_with_both_numbers():
    check_room("x=1", 5, 5, "use 1")
    check_room("x=1", 5, None, "use 1")
    with pytest.raises(InputError) as caught:
        check_room("x=9 (rows)", 3_200_000_000, 1_000_000, "use at most 2")
    assert str(caught.value) == (
        "x=9 (rows) needs 3.2 GB of memory, and there are 1 MB for that; use at most 2."
    )


@pytest.mark.parametrize(
    "count, shown",
    [(0, "0 kB"), (999, "0.999 kB"), (10**12, "1 TB"), (10**21, "1e+06 PB")],
)
def test_bytes_are_shown_in_the_unit_that_fits(count, shown):
    assert show_bytes(count) == shown
