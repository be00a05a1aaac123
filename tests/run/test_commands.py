# SPDX-License-Identifier: Apache-2.0
"""The command that trains, and the resources behind its loop."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sharding
from jaxllm.cluster.phases import Phases
from jaxllm.config.files import config_to_dict
from jaxllm.errors import InputError
from jaxllm.run.startup import open_run
from sharding import ShardingError

# Not imported from `jaxllm.errors`: the numbers are the contract with schedulers.
FINISHED, FAILED, WRONG_INPUT = 0, 1, 2


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A folder with the config file run.py, of four steps."""
    config = config_to_dict(tiny({"steps": 4}))
    (tmp_path / "run.py").write_text(
        "from jaxllm.config.files import config_from_dict\n"
        f"def get_config():\n    return config_from_dict({config!r})\n"
    )
    return tmp_path


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_command_trains_says_how_it_goes_and_ends_with_0(folder, run_command):
    ended = run_command("train --config run.py --workdir run", folder)
    assert (ended.status, ended.stderr) == (FINISHED, "")
    said = ended.stdout.splitlines()
    assert said[0].split() == ["devices", "1", "cpu", "in", "1", "process"]
    assert said[1].startswith("parameters ")
    assert sum(line.startswith("attention: xla (auto: ") for line in said) == 1
    assert sum(line.startswith("compiled the step in ") for line in said) == 1
    assert [line.split()[1] for line in said if line.startswith("step ")] == (
        ["0/4", "1/4", "2/4", "2/4", "3/4", "4/4"]
    )
    assert said[-1] == "finished: run"
    present = {path.name for path in (folder / "run").iterdir()}
    assert present - {".lock"} == {
        "config.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "run_id.txt",
        "checkpoints",
        "tensorboard",
        "tokenizer",
    }
    assert json.loads((folder / "run/config.json").read_text())["steps"] == 4
    again = run_command("train --config run.py --workdir run", folder)
    assert (again.status, again.stderr) == (FINISHED, "")
    assert again.stdout.splitlines() == [
        "run has finished its 4 steps; go on with --config.steps=8, say.",
        "finished: run",
    ]


def test_the_same_command_resumes_and_may_have_other_settings(folder, run_command):
    command = "train --config run.py --workdir run"
    assert run_command(f"{command} --config.steps=2", folder).status == FINISHED
    ended = run_command(f"{command} --config.optimizer.lr=0.5", folder)
    assert (ended.status, ended.stderr) == (FINISHED, "")
    assert "changed since this run began: config.steps: 2 -> 4" in ended.stdout
    assert "config.optimizer.lr: 0.01 -> 0.5" in ended.stdout
    assert "resuming from step 2 (read in " in ended.stdout
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]
    config = json.loads((folder / "run/config.json").read_text())
    assert config["optimizer"]["lr"] == 0.5


def test_a_dry_run_needs_no_data_and_writes_nothing(folder, run_command):
    before = list(folder.iterdir())
    ended = run_command(
        "train --config run.py --dry_run --config.data.paths=nowhere", folder
    )
    assert (ended.status, ended.stderr) == (FINISHED, "")
    assert "blocks/0/attention/query" in ended.stdout
    assert "MiB a device" in ended.stdout and "FLOPs a step" in ended.stdout
    assert list(folder.iterdir()) == before


def test_a_loss_that_is_not_finite_ends_with_1_and_what_to_do(folder, run_command):
    ended = run_command(
        "train --config run.py --workdir run --config.optimizer.lr=1e30 "
        "--config.optimizer.name=sgd --config.optimizer.warmup_steps=0",
        folder,
    )
    assert ended.status == FAILED
    assert ended.stderr.startswith("error: step ")
    assert "parameters, first in " in ended.stderr
    assert "Lower config.optimizer.lr" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (folder / "run/checkpoints").exists() or saved(folder / "run") == []


def shell(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m jaxllm.COMMAND`, with the redirections of a shell."""
    return subprocess.run(
        f"{sys.executable} -m jaxllm.{command}",
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("> /dev/full", "No space left on device"),
        (">(head -1)", "Broken pipe"),
        (">&-", None),
    ],
)
def test_training_goes_on_without_its_output(folder, redirection, said):
    command = "train --config=run.py --workdir=run --config.steps=40"
    pipe = redirection.startswith(">(")
    done = shell(f"{command} {'> ' if pipe else ''}{redirection}", folder)
    assert done.returncode == FINISHED
    warning = f"warning: standard output cannot be written: {said}; the command goes on"
    assert done.stderr.startswith(warning) if said else done.stderr == ""
    assert done.stderr.count("\n") == (said is not None)
    assert saved(folder / "run")[-1] == "40"


def test_a_command_whose_output_is_what_it_is_for_ends_with_1(folder, trained):
    for redirection, said in (
        ("> /dev/full", "error: standard output cannot be written: No space left on"),
        ("> >(exec 0<&-; sleep 1)", ""),  # nobody reads
    ):
        done = shell(f"ledger {trained} {redirection}; exit $?", folder)
        assert done.returncode == FAILED
        assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_text_that_a_terminal_cannot_show_is_escaped(folder, trained):
    workdir = shutil.copytree(trained, folder / "r\u00fcn")
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = shell(f"ledger {workdir}", folder, **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "/r\\xfcn: " in done.stdout


LEFT_OPEN = """
import sys
from jaxllm.config import load_config
from jaxllm.train import train
records = train(load_config("run.py"), "run")
for record in records:
    if record["step"] == 1:
        break
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "1 / 0"])
def test_records_left_open_at_the_end_of_a_program_are_warned_of(folder, end):
    done = subprocess.run(
        [sys.executable, "-c", f"{LEFT_OPEN}{end}"],
        cwd=folder,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == {"": 0, "sys.exit(3)": 3, "1 / 0": 1}[end]
    assert "Close them, with contextlib.closing" in done.stderr


def test_wrong_input_is_refused_before_a_directory_is_made(tiny, tmp_path):
    wrong = [
        (tiny({"mesh.fsdp": 3}), ShardingError),
        (tiny({"data.batch_size": 12}), ShardingError),
        (tiny({"data.paths": (str(tmp_path / "no"),)}), InputError),
        (tiny({"data.eval_paths": (str(tmp_path / "no"),)}), InputError),
        (tiny({"model.vocab_size": 256}), InputError),
    ]
    for config, kind in wrong:
        with pytest.raises(kind):
            with open_run(config, tmp_path / "run", Phases(), overwrite=True):
                pass
    assert list(tmp_path.iterdir()) == []


def test_a_save_remembers_what_made_its_batches_and_its_eval_loss(trained):
    data = json.loads((trained / "checkpoints/6/data/data.json").read_text())
    assert data["next_step"] == 6
    assert data["batches"]["config.data.batch_size"] == 8
    assert len(data["batches"]["config.data.paths"][0]) == 64
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert data["metrics"] == {"eval_loss": last["eval_loss"]}


def batch_of(run, step):
    batch = run.next_batch(step, lambda: False)
    assert batch is not None
    return batch


def test_nothing_moves_to_the_devices_unasked_during_a_step(tiny, tmp_path):
    with open_run(tiny(), tmp_path, Phases(), overwrite=False) as run:
        assert run is not None
        batch = {name: np.asarray(rows) for name, rows in batch_of(run, 0).items()}
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            run.step(run.state, batch)


def test_the_old_state_is_given_to_the_step(tiny, tmp_path):
    with open_run(tiny(), tmp_path, Phases(), overwrite=False) as run:
        assert run is not None
        old = run.state
        state, _ = run.step(old, batch_of(run, 0))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
        assert int(state.step) == 1


def test_a_state_between_two_updates_is_saved_and_a_lost_one_is_not(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with open_run(tiny(), tmp_path, Phases(), overwrite=False) as run:
            assert run is not None
            state, metrics = run.step(run.state, batch_of(run, 0))
            list(run.log(0, state, metrics))
            run.step(state, batch_of(run, 1))  # donates it; interrupted right there
            raise KeyboardInterrupt
    assert not (tmp_path / "checkpoints").exists() or saved(tmp_path) == []


@pytest.mark.parametrize(
    "mesh", [{"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_a_state_is_restored_bitwise_onto_another_mesh(tiny, trained, tmp_path, mesh):
    sizes = {f"mesh.{axis}": size for axis, size in mesh.items()}
    states = []
    for overrides in ({}, sizes):
        # As in test_resume.py: what is compiled there, the cache has.
        config = tiny({"steps": 8, "checkpoint.keep_best": True, **overrides})
        workdir = tmp_path / str(len(states))
        shutil.copytree(trained / "checkpoints", workdir / "checkpoints")
        with open_run(config, workdir, Phases(), overwrite=False) as run:
            assert run is not None and run.num_updates == 6
            used = run.state.params["embedding"].sharding.mesh.shape
            wanted = sharding.make_mesh(config.mesh.sizes).shape
            assert used == wanted
            states.append(jax.device_get(run.state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_what_was_chosen_is_said_once(tiny, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "jaxllm"):
        with open_run(tiny(), tmp_path, Phases(), overwrite=False):
            pass
    text = "\n".join(caplog.messages)
    for name in ("attention", "norm", "cross_entropy"):
        assert text.count(f"\n{name}: xla (auto: mosaic: no ") == 1
    assert "optimizer state" in text
