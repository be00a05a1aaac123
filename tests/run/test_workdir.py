# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: claimed by one process, and nothing of others touched."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal

import pytest

from jaxllm.config.saved import write_config
from jaxllm.errors import InputError
from jaxllm.run.workdir import claim


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_new_directory_is_made_with_its_parents(tiny, tmp_path):
    with claim(tmp_path / "a" / "b", tiny(), overwrite=False):
        assert names(tmp_path / "a" / "b") == set()


def test_a_directory_is_claimed_once_at_a_time(tiny, tmp_path):
    with claim(tmp_path, tiny(), overwrite=False):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=r"is in use by another run; wait"):
                with claim(tmp_path, tiny(), overwrite=overwrite):
                    pass
    with claim(tmp_path, tiny(), overwrite=False):
        pass


def _die_holding(folder, config):
    claim(folder, config, overwrite=False).__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_claim_ends_with_the_process_however_that_dies(tiny, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=_die_holding, args=(tmp_path, tiny())
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    with claim(tmp_path, tiny(), overwrite=False):
        pass


def test_a_run_that_is_there_may_go_on(tiny, trained, tmp_path, caplog):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = names(workdir)
    with caplog.at_level("INFO", "jaxllm"):
        config = tiny({"checkpoint.keep_best": True, "optimizer.lr": 0.5})
        with claim(workdir, config, overwrite=False):
            assert names(workdir) == before
    assert caplog.messages == [
        "changed since this run began: config.optimizer.lr: 0.01 -> 0.5"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_layers": 4}, r"config\.model\.num_layers: 2 -> 4"),
        ({"seed": 3}, r"config\.seed: 0 -> 3"),
    ],
)
def test_a_run_of_another_model_or_seed_is_refused_unless_overwritten(
    tiny, trained, tmp_path, changes, message
):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = names(workdir)
    with pytest.raises(InputError, match=message) as error:
        with claim(workdir, tiny(changes), overwrite=False):
            pass
    assert "--overwrite" in str(error.value)
    assert names(workdir) == before
    with claim(workdir, tiny(changes), overwrite=True):
        assert names(workdir) == set()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"thesis.tex": "years of work", "checkpoints": "not a folder"},
        {"config.json": '{"architectures": ["GPT2LMHeadModel"]}'},
        {"config.json": "[]"},
        {"config.json": '{"steps": 3'},
    ],
)
def test_the_files_of_others_are_refused_and_stay(tiny, tmp_path, files, overwrite):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"give a new or an empty|restore it"):
        with claim(tmp_path, tiny(), overwrite=overwrite):
            pass
    assert names(tmp_path) == set(files)
    assert all((tmp_path / name).read_text() == files[name] for name in files)


def test_overwriting_leaves_what_a_link_points_to(tiny, tmp_path):
    elsewhere, workdir = tmp_path / "elsewhere", tmp_path / "run"
    (elsewhere / "4").mkdir(parents=True)
    write_config(workdir, tiny())
    (workdir / "checkpoints").symlink_to(elsewhere)
    (workdir / "notes.txt").write_text("mine")
    with claim(workdir, tiny(), overwrite=True):
        assert names(workdir) == {"notes.txt"}
    assert (elsewhere / "4").is_dir()


def test_a_run_of_an_older_version_is_compared_by_what_it_has(tiny, tmp_path):
    values = json.loads(json.dumps(dataclasses.asdict(tiny())))
    del values["checkpoint"]["keep_best"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with claim(tmp_path, tiny(), overwrite=False):
        pass
    del values["model"]["qk_norm"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with claim(tmp_path, tiny(), overwrite=False):  # it had the default
        pass
    other = tiny({"model.qk_norm": True})
    with pytest.raises(InputError, match=r"config\.model\.qk_norm: unset -> true"):
        with claim(tmp_path, other, overwrite=False):
            pass
