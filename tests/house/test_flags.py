# SPDX-License-Identifier: Apache-2.0
"""The command line of an entry point, run as users run it: statuses and messages."""

import errno
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sharding
from jaxllm import flags
from jaxllm.config import Config, DataConfig, OptimizerConfig, presets
from jaxllm.config.fields import settings
from jaxllm.config.saved import write_config
from jaxllm.errors import CheckpointError, InputError

ROOT = Path(__file__).parents[2]
PROGRAM = '''\
"""Train something."""
import os
from absl import flags as absl_flags
from jaxllm import flags

RAISE = absl_flags.DEFINE_string("raise", "nothing", "what goes wrong")
ERRORS = {
    "interrupt": KeyboardInterrupt(),
    "bug": ZeroDivisionError("a bug"),
}

def main(argv):
    config = flags.config_from_flags()
    print(config.steps, config.optimizer.lr, config.model.windows, argv[1:])
    if RAISE.value == "behind":
        raise RuntimeError("a thread failed") from OSError(
            28, os.strerror(28), "/full/file"
        )
    if RAISE.value in ERRORS:
        raise ERRORS[RAISE.value]
    return 75 if RAISE.value == "stop" else None

if __name__ == "__main__":
    flags.define_config_flags()
    flags.define_config_flags()
    flags.run(main)
'''
CONFIG = """\
from jaxllm.config import Config, DataConfig
from jaxllm.config import OptimizerConfig, presets
def get_config():
    return Config(
        steps=100,
        model=presets.tiny_1m(),
        data=DataConfig(paths=("a",), sequence_length=64, batch_size=8),
        optimizer=OptimizerConfig(lr=1e-3),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "run.py").write_text(CONFIG)
    config = Config(
        steps=7,
        model=presets.tiny_1m(),
        data=DataConfig(paths=("a",), sequence_length=64, batch_size=8),
        optimizer=OptimizerConfig(lr=0.5),
    )
    write_config(folder / "finished", config)
    return folder


@pytest.fixture
def run(folder, run_python):
    return lambda *arguments: run_python(["program.py", *arguments], folder)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (
            "--config run.py --config.optimizer.lr 3e-4 --config.model.windows=0,16 "
            "--config.steps=5 --config.steps=1e3",
            "1000 0.0003 (0, 16) []\n",
        ),
        ("--workdir=finished --config.steps=8", "8 0.5 (0,) []\n"),
    ],
)
def test_the_config_comes_from_a_file_or_a_run_and_its_overrides(
    run, arguments, printed
):
    done = run(*arguments.split())
    assert (done.status, done.stdout, done.stderr) == (0, printed, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "",
            "--config is missing; give a file, such as --config=configs/quickstart.py.",
        ),
        ("--workdir=none", "--workdir=none holds no run: it has no config.json; give"),
        ("run.py", "'run.py' is not a flag; did you mean --config=run.py?"),
        ("--confg=run.py", "--confg is not a flag; did you mean --config?"),
        (
            "--config=run.py --config.optimizer.lrr=1",
            "config.optimizer.lrr is not a setting; did you mean config.optimizer.lr?",
        ),
    ],
)
def test_wrong_input_is_one_message_and_status_2(run, arguments, message):
    done = run(*arguments.split())
    assert done.status == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("behind", 1, "error: /full/file: No space left on device; nothing that was"),
        ("interrupt", 75, "\ninterrupted; the same command goes on from here.\n"),
        ("stop", 75, ""),
        ("bug", 1, "Traceback"),
    ],
)
def test_other_endings_have_their_status(run, error, status, message):
    done = run("--config=run.py", f"--raise={error}")
    assert (done.status, done.stderr[: len(message)]) == (status, message)
    assert ("Traceback" in done.stderr) == (error == "bug")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("config.steps=0"), 2, "config.steps=0"),
        (sharding.ShardingError("no such mesh"), 2, "no such mesh"),
        (CheckpointError("step 3 is damaged"), 1, "step 3 is damaged"),
        (OSError(errno.ENOSPC, "Full", "/x"), 1, "/x: Full; nothing that was saved is"),
        (OSError(errno.EDQUOT, "Quota"), 1, "Quota; nothing that was saved is lost"),
        (PermissionError(errno.EACCES, "Denied", "/x"), 2, "/x: Denied; give a path"),
        (OSError(errno.EROFS, "Read only", "/x"), 2, "/x: Read only; give a path"),
        (
            flags.flags.UnrecognizedFlagError("zz"),
            2,
            "--zz is not a flag; --help lists",
        ),
        (flags.flags.IllegalFlagValueError("bad"), 2, "bad; --help lists the flags."),
    ],
)
def test_an_error_that_needs_no_traceback_has_a_status_and_a_message(
    error, status, message
):
    explained = flags.explain(error)
    assert explained is not None
    assert explained[0] == status
    assert explained[1].startswith(message)


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError(errno.ENOENT, "no"), KeyError()]
)
def test_an_error_of_the_program_keeps_its_traceback(error):
    assert flags.explain(error) is None


COMMANDS = {  # and whether it takes a config
    "jaxllm.train": True,
    "jaxllm.evaluate": True,
    "jaxllm.generate": True,
    "jaxllm.replay": True,
    "jaxllm.compare_meshes": True,
    "jaxllm.tokenize": False,
    "jaxllm.ledger": False,
    "jaxllm.checkpoint": False,
}


SECTION_HELPS = [
    "jaxllm.train --help optimizer",
    "jaxllm.train --help=optimizer",
    "jaxllm.evaluate -h config.optimizer",
]
ASK = """
import runpy, sys
from jaxllm import flags
known = set(flags.FLAGS)
for line in sys.argv[1:]:
    sys.argv = line.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(f"status {end.code} of {line}")
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Returns what each command line prints, all with status 0.

    All run in one process: most of the time of a command goes into its imports.
    """
    lines = [f"{command} --help" for command in COMMANDS]
    lines += ["jaxllm.train --helpfull", *SECTION_HELPS]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *lines],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    shown, rest = {}, done.stdout
    for line in lines:
        shown[line], found, rest = rest.partition(f"status 0 of {line}\n")
        assert found, line
    assert not rest
    return shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_sections_and_fits_two_screens(helps, command):
    text = helps[f"{command} --help"]
    lines = text.splitlines()
    assert len(lines) <= 2 * 50
    assert max(map(len, lines)) <= 88
    assert f"python -m {command} " in text
    assert "\nFlags:\n  --" in text
    assert "\n  --help " in text
    assert "--pdb" not in text  # one of absl's
    assert ("\nSettings, by section." in text) == COMMANDS[command]


def test_help_shows_flags_with_their_defaults_and_names_every_setting(run):
    done = run("--help", "--config=run.py")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith("Train something.\n\nFlags:\n")
    assert "  --raise    what goes wrong (default: nothing)\n" in done.stdout
    assert "  --workdir  " in done.stdout
    head, _, listed = done.stdout.partition("\nSettings, by section.")
    assert "--config." not in head
    words = set(listed.replace(",", " ").split())
    for setting in settings():
        section, _, field = setting.name.rpartition(".")
        assert {section.removeprefix("config."), field} <= words, setting.name


def test_help_of_generate_names_the_settings_that_it_uses(helps):
    _, _, listed = helps["jaxllm.generate --help"].partition("\nSettings, by section.")
    assert re.findall(r"^  (\S+)", listed, re.M) == ["kernels"]
    assert listed.endswith("--helpfull shows them.\n")


def test_the_full_help_shows_type_default_and_comment_of_every_setting(helps):
    shown = helps["jaxllm.train --helpfull"]
    assert shown.startswith(helps["jaxllm.train --help"])
    for setting in settings():
        default = f" = {setting.default}" if setting.default else ", required"
        flag = f"--{setting.name}: {setting.type}{default}"
        assert f"\n  {flag}\n      {setting.doc}\n" in shown


@pytest.mark.parametrize("line", SECTION_HELPS)
def test_help_of_a_section_shows_that_section_alone(helps, line):
    assert helps[line] == flags.section_help("optimizer")
    assert helps[line].startswith("config.optimizer: Update rule, ")
    assert helps[line].count("\n  --config.optimizer.") == 12
    assert helps[line].count("\n  --config.") == 12


def test_help_of_an_unknown_section_lists_the_sections():
    with pytest.raises(InputError) as error:
        flags.section_help("optimiser")
    assert str(error.value) == (
        "--help=optimiser is not a section of settings; use one of config, model, "
        "model.moe, model.moe.variant, model.rope, model.variant, data, mesh, kernels, "
        "loss, optimizer, eval, checkpoint, anomaly, logging, distributed."
    )


def test_the_settings_page_is_current():
    made = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))["markdown"]()
    assert (ROOT / "docs" / "settings.md").read_text() == made, (
        "run `python scripts/settings_table.py > docs/settings.md`"
    )
