# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: claimed by one process, and nothing of others touched."""

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal

import pytest

from jaxllm.config.saved import write_config
from jaxllm.errors import InputError
from jaxllm.records.ledger import read_ledger
from jaxllm.records.metrics import MetricsWriter
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


@pytest.mark.parametrize(
    ("number", "refused"),
    [
        (errno.ENOSYS, None),
        (errno.ENOLCK, None),
        (errno.EOPNOTSUPP, None),
        (errno.EWOULDBLOCK, "is in use by another run; wait"),
        (errno.EIO, r"\.lock cannot be locked: .*the disk or its server failed"),
        (errno.ESTALE, r"\.lock cannot be locked: .*its server replaced it"),
    ],
)
def test_only_a_lock_that_is_held_means_in_use(
    tiny, tmp_path, monkeypatch, caplog, number, refused
):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if refused:
        with pytest.raises(InputError, match=refused):
            claim(tmp_path, tiny(), overwrite=False).__enter__()
        return
    with claim(tmp_path, tiny(), overwrite=False):
        assert "make sure that no other run has this directory" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl", "run_id.txt"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_where_a_run_has_one_is_set_aside(
    tiny, tmp_path, caplog, name, kind
):
    write_config(tmp_path, tiny())
    (os.mkdir if kind == "folder" else os.mkfifo)(tmp_path / name)
    with claim(tmp_path, tiny(), overwrite=False):
        assert names(tmp_path) == {"config.json", f"{name}.set_aside"}
    assert f"it is now {tmp_path / name}.set_aside" in caplog.text


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "tokenizer", "stalls"])
def test_what_is_no_folder_where_a_run_has_one_is_set_aside(tiny, tmp_path, name):
    write_config(tmp_path, tiny())
    for text in ("mine", "mine too"):
        (tmp_path / name).write_text(text)
        with claim(tmp_path, tiny(), overwrite=False):
            assert not (tmp_path / name).exists()
    assert (tmp_path / f"{name}.set_aside").read_text() == "mine"
    assert (tmp_path / f"{name}.set_aside+").read_text() == "mine too"
    with claim(tmp_path, tiny(), overwrite=True):
        assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "name", ["checkpoints", "metrics.jsonl", "tensorboard", "config.json", ".lock"]
)
def test_a_run_does_not_write_through_a_link(tiny, tmp_path, name):
    elsewhere, workdir = tmp_path / "elsewhere", tmp_path / "run"
    write_config(elsewhere, tiny())
    write_config(workdir, tiny())
    target = elsewhere / "config.json"
    before = target.read_bytes()
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).symlink_to(elsewhere if name == "checkpoints" else target)
    message = r"\.lock is not a plain file; remove it|is a link to .*; move that here"
    with pytest.raises(InputError, match=message):
        claim(workdir, tiny(), overwrite=False).__enter__()
    assert (target.read_bytes(), len(list(elsewhere.iterdir()))) == (before, 1)
    moved = tmp_path / "linked"  # as the message says
    moved.symlink_to(elsewhere)
    with claim(moved, tiny(), overwrite=False):
        pass


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("config.json", "it is not known which settings this run had until now"),
        ("metrics.jsonl", "it has no records of the steps before 6 from now on"),
        ("checkpoints", "has step 6, but no save is left: all is anew"),
    ],
)
def test_what_was_removed_between_two_starts_is_said_once(
    tiny, trained, tmp_path, caplog, removed, said
):
    workdir, config = shutil.copytree(trained, tmp_path / "run"), tiny()
    if removed == "checkpoints":
        shutil.rmtree(workdir / removed)
    else:
        (workdir / removed).unlink()
    with claim(workdir, config, overwrite=False):
        pass
    assert [said in message for message in caplog.messages] == [True]
    if removed == "checkpoints":
        assert (workdir / "metrics.jsonl.set_aside").exists()


def test_a_run_killed_before_its_first_save_begins_again_without_a_word(
    tiny, tmp_path, caplog
):
    write_config(tmp_path, tiny())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 3.0}\n')
    (tmp_path / "config.json.123.tmp").write_text("{")
    with claim(tmp_path, tiny(), overwrite=False):
        assert (tmp_path / "metrics.jsonl").exists()
    assert caplog.messages == []


def test_lines_nested_beyond_reason_do_not_stop_a_resume(tiny, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    deep = "[" * 200_000 + "]" * 200_000
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (workdir / name).open("a") as file:
            file.write(f'{deep}\n{{"step": {deep}}}\n{deep[:1000]}')
    with claim(workdir, tiny(), overwrite=False):
        assert read_ledger(workdir).lives == 1
        with MetricsWriter(workdir, tiny().logging, run_name="run", resume_step=4) as w:
            w.write(4, {"loss": 1.0})
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert lines[-1] == '{"step": 4, "loss": 1.0}'
    assert sum(line.startswith('{"step": ') for line in lines) == 4 + 2 + 1


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
