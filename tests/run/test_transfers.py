# SPDX-License-Identifier: Apache-2.0
"""While a run trains, implicit transfers are refused in every thread."""

import contextlib
import threading

import jax
import numpy as np
import pytest

from jaxllm.run.transfers import ExplicitTransfers
from jaxllm.train import train
from sharding import Placement

REFUSED = "Disallowed host-to-device transfer"
GUARDS = ("jax_transfer_guard_host_to_device", "jax_transfer_guard_device_to_device")


def guards() -> list[str | None]:
    return [getattr(jax.config, name) for name in GUARDS]


def add_one_in_another_thread():
    """Moves a NumPy array to a device implicitly, in a thread of its own."""
    caught: list[BaseException] = []

    def add():
        try:
            jax.jit(lambda x: x + x)(np.ones(3, np.float32))
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def test_an_implicit_transfer_in_the_thread_of_the_data_ends_the_run(
    tiny, tmp_path, monkeypatch
):
    place, threads = Placement.place, set()

    def place_implicitly(self, held):
        threads.add(threading.current_thread())
        return jax.jit(lambda rows: rows)(
            place(self, held) | {"targets": held["targets"]}
        )

    monkeypatch.setattr(Placement, "place", place_implicitly)
    before = guards()
    with pytest.raises(Exception, match=REFUSED):
        list(train(tiny({"eval.every": 0}), tmp_path))
    assert threads and threading.main_thread() not in threads
    assert guards() == before


def test_the_guard_holds_between_records_and_not_for_whoever_takes_them(tiny, tmp_path):
    before, seen = guards(), []

    def should_stop() -> bool:  # asked in the loop
        seen.append(guards())
        return False

    for _ in train(tiny(), tmp_path, should_stop=should_stop):
        assert guards() == before
        add_one_in_another_thread()
    assert seen == [["disallow", "disallow"]] * 6
    assert guards() == before


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_settings_of_before_are_restored(error):
    before = guards()
    jax.config.update(GUARDS[1], "log")
    try:
        # A setting of this thread is not taken for the global one.
        with (
            contextlib.suppress(*[error] if error else []),
            jax.transfer_guard("allow"),
        ):
            with ExplicitTransfers() as transfers:
                with pytest.raises(Exception, match=REFUSED):
                    add_one_in_another_thread()
                with transfers.lifted():
                    add_one_in_another_thread()
                with pytest.raises(Exception, match=REFUSED):
                    add_one_in_another_thread()
                if error:
                    raise error
        assert guards() == [before[0], "log"]
        add_one_in_another_thread()
    finally:
        jax.config.update(GUARDS[1], before[1])
