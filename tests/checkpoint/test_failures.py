# SPDX-License-Identifier: Apache-2.0
"""Checkpoints after kills, full disks, damage and half removals: nothing is lost."""

import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint import Checkpoints
from jaxllm.config import CheckpointConfig
from jaxllm.errors import CheckpointError, InputError

ALL = CheckpointConfig(keep_latest=100)
BIG = {"w": jnp.ones(2**20)}  # 4 MiB

# Where an array is broken, threads of TensorStore call an event loop that Orbax has
# closed, and nobody can catch that.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_state(step: int):
    return {"params": {"w": jnp.full((8, 8), step / 7), "n": jnp.int32(step)}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(left, right):
    same = jax.tree.map(np.array_equal, left, right)
    assert all(jax.tree.leaves(same)), same


def save_steps(folder: Path, *steps: int):
    with Checkpoints(folder, ALL) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"step": step})
    return Checkpoints(folder, ALL)


def test_folders_that_are_not_whole_steps_are_named_ignored_and_kept(tmp_path, caplog):
    save_steps(tmp_path, 1)
    (tmp_path / "30").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / "20")
    shutil.rmtree(tmp_path / "20" / "state")
    (tmp_path / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    for name in ("notes", "-5", "1e3"):
        (tmp_path / name).mkdir()
    (tmp_path / "50").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_latest=1))
    assert checkpoints.latest() == checkpoints.latest() == 1
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3
    for name in ("20", "30", "40.orbax-checkpoint-tmp"):
        assert any(f"{tmp_path / name} is" in message for message in warned)
    assert sorted(tmp_path.rglob("*")) == before

    with checkpoints:
        checkpoints.save(20, make_state(20), {})
    assert checkpoints.steps() == [20]
    kept = {"20.incomplete", "30.incomplete", "notes", "-5", "1e3", "50"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {"20"}


def test_a_missing_or_short_file_is_never_taken_for_the_saved_state(tmp_path):
    save_steps(tmp_path / "whole", 1, 2)
    names = [p.relative_to(tmp_path) for p in (tmp_path / "whole/2").rglob("*")]
    target, want = abstract(make_state(0)), make_state(2)
    outcomes = set()
    for name in names:
        if not (tmp_path / name).is_file():
            continue
        size = (tmp_path / name).stat().st_size
        for new_size in (None, 0, size // 2):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            path = tmp_path / "copy" / name.relative_to("whole")
            if new_size is None:
                path.unlink()
            else:
                os.truncate(path, new_size)
            checkpoints = Checkpoints(tmp_path / "copy", ALL)
            if checkpoints.latest() == 1:
                outcomes.add("ignored")
                continue
            try:
                state, data = checkpoints.restore(2, target)
            except CheckpointError as error:
                assert str(tmp_path / "copy/2") in str(error)
                outcomes.add("refused")
            else:
                assert_same(state, want)
                assert data == {"step": 2}
                outcomes.add("exact")
    assert outcomes == {"ignored", "refused", "exact"}


KILLED = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import CheckpointConfig

checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_latest=1))
state = {"params": {"w": jnp.ones(2**24)}, "step": jnp.ones((), jnp.int32)}
checkpoints.save(1, state, {"step": 1})
checkpoints.wait()
checkpoints.save(2, jax.tree.map(lambda x: x + 1, state), {"step": 2})
began, written = (os.path.join(sys.argv[1], name) for name in sys.argv[2:])
while not os.path.exists(began) and not os.path.exists(written):
    time.sleep(1e-4)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
    config, was_in_the_middle = CheckpointConfig(keep_latest=1), False
    target = {
        "params": {"w": jax.ShapeDtypeStruct((2**24,), jnp.float32)},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    began, written = "2.orbax-checkpoint-tmp", "2"
    for number, moment in enumerate((written, began, began, began, began)):
        if was_in_the_middle:
            break
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", KILLED, str(folder), moment, written]
        done = subprocess.run(command)
        assert done.returncode == -signal.SIGKILL
        was_in_the_middle |= (folder / began).exists()
        with Checkpoints(folder, config) as checkpoints:
            latest = checkpoints.latest()
            assert latest in (1, 2)
            state, data = checkpoints.restore(latest, target)
            assert data == {"step": latest} and state["step"] == latest
            assert jnp.all(state["params"]["w"] == latest)
            checkpoints.save(latest + 1, state, {})
        # A kill between step 2 and the removal of step 1 may leave half of that.
        left = {path.name for path in folder.iterdir()} - {"1.incomplete"}
        assert left == {str(latest + 1)}
    assert was_in_the_middle


@contextlib.contextmanager
def file_size_limit(num_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_orbax_left_nothing():
    """Checks that no thread waits for a failed save, and that none will be heard of."""
    kinds = [type(thread).__name__ for thread in threading.enumerate()]
    assert "_SignalingThread" not in kinds  # or Python's exit takes 10 minutes
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(each.message) for each in warned] == []


def test_a_failed_save_is_raised_once_and_leaves_the_others(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=1)) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(4)}, {})
        checkpoints.wait()
        with file_size_limit(2**20):
            checkpoints.save(2, BIG, {})
            with pytest.raises(CheckpointError, match=r"Step 2 could not be saved"):
                checkpoints.save(3, BIG, {})
            assert_orbax_left_nothing()
        checkpoints.wait()
        assert checkpoints.latest() == 1
        checkpoints.save(2, BIG, {})  # the cause is gone: the run could go on
    assert {path.name for path in tmp_path.iterdir()} == {"2"}


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(tmp_path, caplog):
    with file_size_limit(2**20), pytest.raises(KeyboardInterrupt):
        with Checkpoints(tmp_path, ALL) as checkpoints:
            checkpoints.save(1, BIG, {})
            raise KeyboardInterrupt
    assert "Step 1 could not be saved" in caplog.text
    with file_size_limit(2**20), pytest.raises(CheckpointError):
        with Checkpoints(tmp_path, ALL) as checkpoints:
            checkpoints.save(1, BIG, {})


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, stderr=-3).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], stderr=subprocess.DEVNULL)


def test_a_full_disk_is_a_checkpoint_error(disk):
    with Checkpoints(disk / "checkpoints", ALL) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(2, BIG, {})
        with pytest.raises(CheckpointError, match="could not be saved"):
            checkpoints.wait()
        assert_same(checkpoints.restore(1, abstract(make_state(0)))[0], make_state(1))
        checkpoints.save(2, make_state(2), {})
    assert checkpoints.steps() == [1, 2]


def test_a_disk_that_becomes_read_only_is_a_checkpoint_error(disk):
    with Checkpoints(disk / "checkpoints", ALL) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match=r"could not be saved .*Read-only"):
            checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
        assert_orbax_left_nothing()
        assert_same(checkpoints.restore(1, abstract(make_state(0)))[0], make_state(1))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        checkpoints.save(2, make_state(2), {})
    assert checkpoints.steps() == [1, 2]


def test_a_disk_that_vanishes_gets_no_other_one_in_its_place(disk):
    run = disk / "run"
    run.mkdir()
    with Checkpoints(run / "checkpoints", ALL) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        with pytest.raises(CheckpointError, match=f"{run} has vanished .* step 2"):
            checkpoints.save(2, make_state(2), {})
        assert not list(disk.iterdir())


def test_a_folder_that_was_moved_is_not_replaced(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with Checkpoints(run / "checkpoints", ALL) as checkpoints:
        run.rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match="has vanished"):
            checkpoints.save(1, make_state(1), {})
        run.mkdir()
        with pytest.raises(CheckpointError, match="has vanished"):
            checkpoints.save(1, make_state(1), {})
        run.rmdir()
        (tmp_path / "moved").rename(run)
        checkpoints.save(1, make_state(1), {})
    assert checkpoints.steps() == [1]


def test_saves_that_are_faster_than_the_disk_wait_for_each_other(tmp_path):
    states = [{"w": jnp.full(2**23, float(step))} for step in range(4)]  # 32 MiB each
    with Checkpoints(tmp_path, ALL) as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, state, {})
            state["w"].delete()  # as the next update does to its memory
    assert checkpoints.steps() == [0, 1, 2, 3]
    for step in range(4):
        state, _ = checkpoints.restore(step, abstract(states[step]))
        assert jnp.all(state["w"] == step)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", ALL)
    with pytest.raises((InputError, CheckpointError), match="file/checkpoints"):
        checkpoints.save(1, make_state(1), {})
    with pytest.raises(InputError, match="is not a folder"):
        Checkpoints(tmp_path / "file", ALL).latest()


def test_nothing_is_printed_and_no_thread_stays(tmp_path, capfd, caplog):
    save_steps(tmp_path, 1)  # the first one starts threads that JAX keeps
    before = set(threading.enumerate())
    with caplog.at_level(logging.INFO):
        checkpoints = save_steps(tmp_path, 2, 3, 4)
        checkpoints.restore(4, abstract(make_state(0)))
        with Checkpoints(tmp_path / "b", ALL) as failing, file_size_limit(2**20):
            failing.save(1, BIG, {})
            with pytest.raises(CheckpointError):
                failing.wait()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)  # asyncio's are told to end, and not waited for
    assert set(threading.enumerate()) <= before
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def big_state(step: int):
    return {"params": {"w": jnp.full((64, 128), step / 7), "n": jnp.int32(step)}}


def save_big(folder: Path, *steps: int) -> Checkpoints:
    with Checkpoints(folder, ALL) as checkpoints:
        for step in steps:
            checkpoints.save(step, big_state(step), {"step": step})
    return Checkpoints(folder, ALL)


def test_a_flipped_bit_is_never_restored(tmp_path):
    checkpoints = save_big(tmp_path, 1)
    flip_a_bit(largest_file(tmp_path / "1" / "state"))
    with pytest.raises(CheckpointError, match=r"is damaged: 1 of 2 .* first params/w"):
        checkpoints.restore(1, abstract(big_state(0)))
    with pytest.raises(CheckpointError, match=r"is damaged: 1 of 2 .* first params/w"):
        checkpoints.restore_params(1, abstract(big_state(0)["params"]))


def test_a_changed_data_position_is_never_restored(tmp_path, caplog):
    checkpoints = save_big(tmp_path, 1)
    path = tmp_path / "1" / "data" / "data.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 2'))
    assert checkpoints.steps() == []
    assert "its data is not what was saved" in caplog.text
    with pytest.raises(CheckpointError, match="no step of"):
        checkpoints.restore_newest(abstract(big_state(0)))


def test_the_newest_intact_step_wins_and_the_damaged_one_is_kept_aside(
    tmp_path, caplog
):
    save_big(tmp_path, 1, 2, 3)
    for step in (2, 3):
        flip_a_bit(largest_file(tmp_path / str(step) / "state"))
    with Checkpoints(tmp_path, ALL) as checkpoints:
        step, state, data = checkpoints.restore_newest(abstract(big_state(0)))
        assert (step, data) == (1, {"step": 1})
        assert_same(state, big_state(1))
        assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == 2
        assert checkpoints.steps() == [1]
        assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "3"}  # as yet
        checkpoints.save(2, big_state(2), {"step": 2})
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "2.damaged", "3.damaged"}
    assert_same(
        Checkpoints(tmp_path, ALL).restore(2, abstract(big_state(0)))[0], big_state(2)
    )


def test_a_run_whose_saves_are_all_damaged_is_not_begun_anew(tmp_path):
    checkpoints = save_big(tmp_path, 1)
    flip_a_bit(largest_file(tmp_path / "1" / "state"))
    with pytest.raises(CheckpointError, match=r"no step of .* can be read"):
        checkpoints.restore_newest(abstract(big_state(0)))


def test_a_save_without_checksums_is_read_with_a_warning(tmp_path, caplog):
    checkpoints = save_big(tmp_path, 1)
    path = tmp_path / "1" / "data" / "data.json"
    path.write_text('{"next_step": 1, "step": 1}')
    state, data = checkpoints.restore(1, abstract(big_state(0)))
    assert data == {"step": 1}
    assert_same(state, big_state(1))
    assert "no checksums" in caplog.text
