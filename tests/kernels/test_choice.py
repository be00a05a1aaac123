# SPDX-License-Identifier: Apache-2.0
"""The rule by which an implementation is taken, refused or passed over."""

import pytest

from pallas_kernels.choice import choose

NONE = {"mosaic": [], "cudnn": []}
NO_CUDNN = {"mosaic": [], "cudnn": ["segments"]}
NEITHER = {"mosaic": ["head width 65", "platform cpu"], "cudnn": ["segments"]}


@pytest.mark.parametrize(
    ("asked", "refusals", "taken", "reason"),
    [
        ("auto", NONE, "mosaic", "honours all"),
        ("auto", NO_CUDNN, "mosaic", "honours all"),
        ("auto", {"mosaic": ["sinks"], "cudnn": []}, "cudnn", "mosaic: no sinks"),
        ("auto", NEITHER, "xla", "no head width 65, no platform cpu; cudnn: no"),
        ("auto", {}, "xla", "honours all"),
        ("cudnn", NONE, "cudnn", "asked for"),
        ("xla", NEITHER, "xla", "asked for"),
    ],
)
def test_the_best_that_honours_everything_is_taken(asked, refusals, taken, reason):
    choice = choose("attention", asked, refusals)
    assert choice.implementation == taken
    assert reason in choice.reason


def test_an_implementation_that_cannot_is_refused_with_those_that_can():
    with pytest.raises(NotImplementedError) as raised:
        choose("attention", "cudnn", NO_CUDNN)
    said = str(raised.value)
    assert "implementation=cudnn cannot honour segments" in said
    assert "use mosaic or xla, which can" in said


def test_an_implementation_that_an_operation_does_not_have_is_refused():
    with pytest.raises(ValueError, match="it has mosaic, xla, and auto"):
        choose("norm", "cudnn", {"mosaic": []})
