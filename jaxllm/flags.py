# SPDX-License-Identifier: Apache-2.0
"""The command line of every entry point: absl flags, exit statuses, one-line errors.

Each setting is a flag of its own: `--config.optimizer.lr=3e-4` overrides what the file
of `--config` says. A program that uses these flags ends with

    if __name__ == "__main__":
        flags.define_config_flags()
        flags.run(main)
"""

import errno
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags

from jaxllm import output
from jaxllm.cluster import membership
from jaxllm.cluster.environment import has_gpus, prepare_gpus
from jaxllm.config import Config, load_config, override
from jaxllm.config.fields import (
    section_names,
    setting_types,
    settings,
    unknown_setting,
)
from jaxllm.config.saved import read_config
from jaxllm.errors import (
    FAILED,
    FINISHED,
    RESUMABLE,
    WRONG_INPUT,
    CheckpointError,
    InputError,
    describe_os_error,
)
from jaxllm.files import local_path
from pallas_kernels.self_check import KernelMismatch
from sharding import ShardingError

FLAGS = flags.FLAGS

_STATUSES = {  # errors of the system that need no traceback, and how they end a command
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE), FAILED),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), FAILED),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), WRONG_INPUT),
}

HELP_FLAGS = ("--help", "-help", "-h", "--helpfull")
HELP_COLUMNS = 88

flags.disclaim_key_flags()  # flags defined here belong to the module that asks for them


def run(
    main: Callable[[list[str]], int | None],
    *,
    positionals: bool = False,
    sections: Collection[str] | None = None,
    needs_output: bool = True,
):
    """Parses the command line, calls `main` and exits with its status.

    Args:
      main: gets the program's name and its positional arguments. What it returns is the
        exit status, None is 0.
      positionals: accept arguments that are no flags.
      sections: of the settings that --help names; None is all.
      needs_output: end with 1 when standard output cannot be written; else go on.
    """

    def parse(argv: list[str]) -> list[str]:
        return _parse(argv, positionals, sections)

    with output.guarded(needed=needs_output):
        _run(main, parse)


def _run(main: Callable[[list[str]], int | None], parse: Callable):
    try:
        prepare_gpus(os.environ, gpus=has_gpus(jax.config.jax_platforms))
        app.run(_flushed(main), flags_parser=parse)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here.", file=sys.stderr)
        membership.leave(RESUMABLE, "interrupted")
    except output.OutputError as error:
        if error.errno != errno.EPIPE:  # its reader, such as `head`, has what it wants
            print(f"error: {error.strerror}", file=sys.stderr)
        membership.leave(FAILED, "nobody reads its output")
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        membership.leave(end.code or FINISHED)
    except Exception as error:
        _fail(error)


def _flushed(main: Callable[[list[str]], int | None]):
    """Returns `main`, with an error if what it prints cannot be written."""

    def run_main(argv: list[str]) -> int | None:
        status = main(argv)
        sys.stdout.flush()
        return status

    return run_main


def _fail(error: Exception) -> NoReturn:
    """Explains an error and ends this process."""
    explained = next(filter(None, map(explain, _causes(error))), None)
    if explained is None or explained[0] != WRONG_INPUT:
        membership.hear_others()
    if explained is not None:
        status, message = explained
        print(f"error: {message}", file=sys.stderr)
        membership.leave(status, message)
    if jax.distributed.is_initialized():
        traceback.print_exception(error)
        membership.leave(FAILED, f"{type(error).__name__}: {error}")
    raise error


def define_config_flags():
    """Defines --config, --workdir and one flag for each setting; twice is once."""
    if "config" in FLAGS:
        return
    flags.DEFINE_string(
        "config", None, "Python file that defines get_config() -> Config"
    )
    flags.DEFINE_string(
        "workdir", None, "directory of the run: its checkpoints, metrics and logs"
    )
    for setting in settings():
        flags.DEFINE_string(setting.name, None, setting.doc)


def config_from_flags() -> Config:
    """Returns the Config of --config, or else of the run in --workdir, with overrides.

    Raises:
      InputError: if neither names a config.
    """
    values = {name: FLAGS[f"config.{name}"].value for name in setting_types()}
    overrides = {name: value for name, value in values.items() if value is not None}
    if FLAGS.config is not None:
        return load_config(local_path("--config", FLAGS.config), overrides)
    if FLAGS.workdir is None:
        raise InputError(
            "--config is missing; give a file, such as --config=configs/quickstart.py."
        )
    return override(read_config(workdir_from_flags()), overrides)


def workdir_from_flags() -> Path:
    """Returns --workdir.

    Raises:
      InputError: if it is missing.
    """
    if FLAGS.workdir is None:
        raise InputError(
            "--workdir is missing; give the directory of the run, such as "
            "--workdir=runs/first."
        )
    return local_path("--workdir", FLAGS.workdir)


def help_text(sections: Collection[str] | None = None) -> str:
    """Returns the text of --help: usage, flags, names of settings by section.

    Args:
      sections: to name; None is all.
    """
    names = _own_flags()
    text = f"{cleandoc(sys.modules['__main__'].__doc__ or '')}\n\nFlags:\n"
    indent = 4 + max(map(len, ["help", *names]))
    for name, flag in names.items():
        is_off = flag.default is None or flag.default is False or flag.default == []
        default = "" if is_off else f" (default: {flag.default})"
        ours = (flag.help or "").partition(";\n")[0]  # absl adds a line to some
        text += _paragraph(f"--{name}", f"{ours}{default}", indent)
    if "config" not in names:
        return text + _paragraph("--help", "show this text", indent)
    text += _paragraph(
        "--help",
        "show this text; with a section, such as --help model, its settings"
        " with types, defaults and meanings; --helpfull shows all of them",
        indent,
    )
    text += (
        "\nSettings, by section. Each is a flag that overrides the config file, such\n"
        "as --config.steps=1000 or --config.optimizer.lr=3e-4:\n"
    )
    known = [name.partition(".")[2] for name in section_names().values()]
    shown = known if sections is None else [s for s in known if s in sections]
    indent = 4 + max(map(len, shown))
    for section in shown:
        fields = [name.rpartition(".")[2] for name in _names_in(section)]
        text += _paragraph(section or "config", ", ".join(fields), indent)
    if shown != known:
        text += "\nThe others are those of the run; --helpfull shows them.\n"
    return text


def section_help(section: str) -> str:
    """Returns the text of --help SECTION: its settings with types and comments.

    Args:
      section: such as "optimizer", "model.moe" or, for a run's own settings, "config".

    Raises:
      InputError: there is no such section.
    """
    docs = {name: kind.__doc__ for kind, name in section_names().items()}
    name = section if section in docs else f"config.{section}"
    if name not in docs:
        raise InputError(
            f"--help={section} is not a section of settings; use one of "
            f"{', '.join(other.removeprefix('config.') for other in docs)}."
        )
    text = f"{name}: {docs[name]}\n\n"
    for setting in settings():
        if setting.name.rpartition(".")[0] == name:
            default = f" = {setting.default}" if setting.default else ", required"
            text += f"  --{setting.name}: {setting.type}{default}\n"
            text += f"      {setting.doc}\n"
    return text


def _own_flags() -> dict[str, flags.Flag]:
    """Returns the flags of the program by name, without one for each setting."""
    return {
        flag.name: flag
        for module, module_flags in FLAGS.flags_by_module_dict().items()
        if module == sys.argv[0] or module.startswith("jaxllm.")
        for flag in module_flags
        if not flag.name.startswith("config.")
    }


def _names_in(section: str) -> list[str]:
    return [name for name in setting_types() if name.rpartition(".")[0] == section]


def _paragraph(head: str, text: str, indent: int) -> str:
    """Returns text beside its head, wrapped."""
    return (
        textwrap.fill(
            text,
            HELP_COLUMNS,
            initial_indent=f"  {head}".ljust(indent + 2),
            subsequent_indent=" " * (indent + 2),
            break_on_hyphens=False,
        )
        + "\n"
    )


def _show_help(arguments: list[str], sections: Collection[str] | None) -> None:
    """Prints what --help asks for: with a section, or --helpfull, settings in full."""
    asked = next(each for each in arguments if each.partition("=")[0] in HELP_FLAGS)
    flag, _, section = asked.partition("=")
    behind = arguments[arguments.index(asked) + 1 :][:1]
    if not section and behind and not behind[0].startswith("-"):
        section = behind[0]
    if "config" in FLAGS and section:
        print(section_help(section), end="")
        return
    print(help_text(sections), end="")
    if "config" in FLAGS and flag == "--helpfull":
        for name in section_names().values():
            print(f"\n{section_help(name)}", end="")


def _parse(
    argv: list[str], positionals: bool, sections: Collection[str] | None
) -> list[str]:
    # absl's own help exits with 1 and lists the flags of every imported library.
    if any(argument.partition("=")[0] in HELP_FLAGS for argument in argv[1:]):
        _show_help(argv[1:], sections)
        sys.stdout.flush()
        sys.exit(FINISHED)
    rest = FLAGS(argv)
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = -1  # warnings; app.run would make it the info of libraries
    if rest[1:] and not positionals:
        hint = "; did you mean --config={0}?" if rest[1].endswith(".py") else "."
        raise InputError(f"{rest[1]!r} is not a flag{hint.format(rest[1])}")
    return rest


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def explain(error: BaseException) -> tuple[int, str] | None:
    """Returns exit status and message of an error that needs no traceback."""
    if isinstance(error, InputError | ShardingError):
        return WRONG_INPUT, str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        return WRONG_INPUT, _unknown_flag(error.flagname)
    if isinstance(error, flags.Error):
        return WRONG_INPUT, f"{error}; --help lists the flags."
    if isinstance(error, CheckpointError | FloatingPointError | KernelMismatch):
        return FAILED, str(error)
    if not isinstance(error, OSError) or error.errno not in _STATUSES:
        return None
    place = f"{error.filename}: " if error.filename else ""
    why = describe_os_error(error.errno, error.strerror)
    return _STATUSES[error.errno], f"{place}{why}."


def _unknown_flag(name: str) -> str:
    if name.startswith("config.") and "config" in FLAGS:
        return unknown_setting(name.removeprefix("config."))
    known = [other for other in FLAGS if not other.startswith("config.")]
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean --{close[0]}?" if close else "--help lists them all."
    return f"--{name} is not a flag; {hint}"
