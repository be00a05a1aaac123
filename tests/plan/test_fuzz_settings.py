# SPDX-License-Identifier: Apache-2.0
"""Settings at random: each is planned or refused, in seconds and with a message."""

import random
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_settings.py"


def test_settings_at_random_are_planned_or_refused_with_a_message():
    find_faults = runpy.run_path(str(SCRIPT))["find_faults"]
    ends, reports = zip(*find_faults(random.Random(7), 40), strict=True)
    assert "".join(reports) == ""
    assert {"planned", "refused"} == set(ends)
