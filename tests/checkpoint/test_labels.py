# SPDX-License-Identifier: Apache-2.0
"""A save counts for the step and the run it says it is of, and for no other."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxllm.checkpoint import Checkpoints, find_steps
from jaxllm.checkpoint.label import RUN_ID, give_run_id, read_label
from jaxllm.config import CheckpointConfig
from jaxllm.errors import CheckpointError

ALL = CheckpointConfig(keep_latest=100)


def state_of(step: int):
    return {"step": jnp.int32(step), "params": {"w": jnp.full((8, 8), step / 7)}}


def abstract():
    return jax.eval_shape(lambda: state_of(0))


def save_steps(workdir: Path, *steps: int) -> Path:
    """Returns the folder of the checkpoints of a run."""
    workdir.mkdir(exist_ok=True)
    give_run_id(workdir, None)
    with Checkpoints(workdir / "checkpoints", ALL) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {}, metrics={"eval_loss": 9 - step})
    return workdir / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_steps(tmp_path_factory.mktemp("runs") / "a", 4, 8)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved.parent, tmp_path / "a") / saved.name


def assert_resumes_from(folder: Path, step: int):
    """Asserts that every reader takes that step, and that the next save goes on."""
    with Checkpoints(folder, ALL) as checkpoints:
        assert checkpoints.latest() == checkpoints.best() == step
        found, state, _ = checkpoints.restore_newest(abstract())
        assert (found, state["step"]) == (step, step)
        assert np.array_equal(state["params"]["w"], state_of(step)["params"]["w"])
        checkpoints.save(step + 1, state_of(step + 1), {})
    assert find_steps(folder)[0][-1] == step + 1


@pytest.mark.parametrize("label", ["10", "3", "008"])
def test_a_copy_under_another_label_is_set_aside(folder, caplog, label):
    shutil.copytree(folder / "8", folder / label)
    assert_resumes_from(folder, 8)
    assert "is a save of step 8, under another name" in caplog.text
    assert (folder / f"{label}.misplaced").is_dir()
    assert not (folder / label).exists()


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"next_step": "8"}',
        b'{"next_step": 8, "checksums": 3}',
        b'{"next_step": 8, "checksums": {"data": "00000000"}}',
        b'{"next_step": 8, "arrays": {}}',
        b"\xff\xfe",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a": ' * 200 + b"1" + b"}" * 200,
    ],
)
def test_data_that_is_not_as_saved_sets_the_step_aside(folder, text):
    (folder / "8/data/data.json").write_bytes(text)
    assert_resumes_from(folder, 4)
    assert (folder / "8.damaged").is_dir()


@pytest.mark.parametrize("key", ["next_step", "run", "arrays", "metrics", "checksums"])
def test_data_without_one_of_its_keys_sets_the_step_aside(folder, key):
    path = folder / "8/data/data.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    assert_resumes_from(folder, 4)


def test_a_save_of_another_run_is_set_aside(folder, tmp_path, caplog):
    other = save_steps(tmp_path / "b", 12)
    shutil.copytree(other / "12", folder / "12")
    assert_resumes_from(folder, 8)
    assert "12 is a save of another run" in caplog.text
    assert (folder / "12.misplaced").is_dir()


def test_a_run_whose_id_was_removed_has_that_of_its_newest_save(folder):
    before = (folder.parent / RUN_ID).read_text()
    (folder.parent / RUN_ID).unlink()
    assert_resumes_from(folder, 8)
    give_run_id(folder.parent, folder / "8")
    assert (folder.parent / RUN_ID).read_text() == before


def test_a_link_in_place_of_a_step_is_set_aside_and_its_target_stays(folder, tmp_path):
    shutil.move(folder / "8", tmp_path / "elsewhere")
    (folder / "8").symlink_to(tmp_path / "elsewhere")
    assert_resumes_from(folder, 4)
    assert read_label(tmp_path / "elsewhere").step == 8


def test_no_step_that_is_whole_is_no_reason_to_begin_anew(folder):
    for step in ("4", "8"):
        (folder / step / "data/data.json").write_text("{}")
    checkpoints = Checkpoints(folder, ALL)
    assert checkpoints.steps() == [] and not checkpoints.is_empty()
    with pytest.raises(CheckpointError, match=r"no step of .* put one back"):
        checkpoints.restore_newest(abstract())


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EIO, "the disk or its server failed: run the same command again"),
        (errno.ESTALE, "its server replaced it meanwhile: run the same command again"),
        (errno.EACCES, "give a path that you may read"),
        (errno.EMFILE, "raise the limit of open files"),
    ],
)
@pytest.mark.parametrize("what", ["data.json", "arrays"])
def test_a_fault_of_the_system_is_not_taken_for_damage(
    folder, monkeypatch, number, advice, what
):
    def fail(*args, **kwargs):
        if what == "data.json":
            raise OSError(number, "Fault", str(folder))
        raise ValueError(f"NOT_FOUND: Error reading: [OS error {number}: Fault]")

    checkpoints = Checkpoints(folder, ALL)
    if what == "data.json":
        monkeypatch.setattr(Path, "read_bytes", fail)
        monkeypatch.setattr("jaxllm.checkpoint.label._read", fail)
    else:
        monkeypatch.setattr(ocp, "load", fail)
    with pytest.raises(CheckpointError, match=f"8 cannot be read: .*{advice}|{advice}"):
        checkpoints.restore_newest(abstract())
    monkeypatch.undo()
    assert checkpoints.steps() == [4, 8]


@pytest.mark.parametrize("kind", [AttributeError, TypeError, MemoryError])
def test_a_fault_of_the_program_is_not_taken_for_damage(folder, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise kind("what is wrong is not in the files")

    monkeypatch.setattr(ocp, "load", fail)
    checkpoints = Checkpoints(folder, ALL)
    with pytest.raises(kind):
        checkpoints.restore_newest(abstract())
    assert checkpoints.steps() == [4, 8]


def test_every_save_of_a_training_is_verified_as_the_command_is_typed(
    trained, run_command, tmp_path
):
    shutil.copytree(trained, tmp_path / "run")
    steps = find_steps(tmp_path / "run/checkpoints")[0]
    done = run_command(["checkpoint", "verify", "run"], tmp_path)
    assert (done.status, done.stderr) == (0, "")
    arrays = len(read_label(tmp_path / f"run/checkpoints/{steps[-1]}").arrays)
    assert done.stdout.splitlines() == [
        f"run/checkpoints/{step}: {arrays} arrays" for step in steps
    ]


def test_the_verify_command_names_what_is_wrong(trained, run_command, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run") / "checkpoints"
    good, bad = map(str, find_steps(folder)[0][-2:])
    arrays = max((folder / bad / "state").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    shutil.copytree(folder / good, folder / "100")
    done = run_command(["checkpoint", "verify", "run"], tmp_path)
    assert done.status == 1
    assert f"run/checkpoints/{good}: " in done.stdout
    assert f"run/checkpoints/100: is a save of step {good}" in done.stdout
    assert f"run/checkpoints/{bad}: is damaged: 1 of " in done.stdout
    wrong = run_command(["checkpoint", "verify", "none"], tmp_path)
    assert wrong.status == 2
