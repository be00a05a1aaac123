# SPDX-License-Identifier: Apache-2.0
"""What the documents say: their commands run, their links and names exist.

The blocks of a document run in order in a folder of their own, as its reader would run
them, but small: see `typed_commands`.
"""

import importlib
import re
from pathlib import Path

import pytest

from jaxllm import flags, tokenize
from jaxllm.config.fields import section_names, setting_types
from sharding import rules
from sharding.alphabet import LETTERS
from typed_commands import (
    DOCUMENTS,
    ELSEWHERE,
    RUNS_HERE,
    SMALLER,
    WITH_BLOCKS,
    blocks,
    commands,
    inline_code,
    is_elsewhere,
    make_data,
    run,
    smaller,
    without_environment,
    write_tiny_config,
    written_elsewhere,
)

ROOT = Path(__file__).parents[2]
TREES = ("jaxllm", "sharding", "pallas_kernels", "configs", "scripts", "tests", "docs")


@pytest.mark.parametrize("document", WITH_BLOCKS, ids=lambda path: path.name)
def test_the_commands_of_a_document_run(document, tmp_path, run_python):
    make_data(tmp_path)
    (tmp_path / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.py"):
        write_tiny_config(tmp_path / "configs" / config.name, config)
    for language, text in blocks(document):
        if language == "bash":
            for command in commands(text):
                if is_elsewhere(command):
                    continue
                assert without_environment(command).startswith(RUNS_HERE), (
                    f"{document.name}: {command!r} is not known; see typed_commands.py"
                )
                run(smaller(command), tmp_path, run_python)
        elif language == "python" and (file := _file_name(text)):
            (tmp_path / "written").mkdir(exist_ok=True)
            (tmp_path / "written" / file.name).write_text(text)
            write_tiny_config(tmp_path / file, tmp_path / "written" / file.name)
        elif language == "python":
            ended = run_python(["-c", text], tmp_path)
            assert ended.status == 0, f"{text}\n{ended.stdout}\n{ended.stderr}"
        else:
            assert language == "text", f"{document.name}: a block of {language!r}"
    if document.name == "reliability.md":
        assert (tmp_path / "runs" / "profiled" / "profile" / "steps-10-12.txt").exists()
    if document.name == "README.md":
        made = {path.name for path in (tmp_path / "runs" / "first").iterdir()}
        assert set(_first_column(document, "in `--workdir`")) == made - {".lock"}


def test_each_reason_not_to_run_a_command_is_needed():
    typed = [
        command
        for document in WITH_BLOCKS
        for language, text in blocks(document)
        if language == "bash"
        for command in commands(text)
    ]
    typed += written_elsewhere()
    for beginning in ELSEWHERE:
        assert any(command.startswith(beginning) for command in typed), beginning
    for word in SMALLER:
        assert any(word in command for command in typed), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_in_backticks_exists(document):
    options = _known_options()
    written = {str(_file_name(text)) for _, text in blocks(document)}
    for name in inline_code(document):
        if re.fullmatch(rf"({'|'.join(TREES)})/[\w./-]*", name):
            assert (ROOT / name).exists() or name in written, name
        elif re.fullmatch(r"(jaxllm|sharding|pallas_kernels)(\.\w+)+", name):
            _resolve(name)
        elif re.fullmatch(r"config\.\w+(\.\w+)?", name) and name != "config.json":
            sections = section_names().values()
            assert name.removeprefix("config.") in setting_types() or name in sections
        elif match := re.match(r"--(\w+)", name):
            assert match[1].removeprefix("no") in options or match[1] in options, name
        elif match := re.match(r"make (\w+)$", name):
            assert f"\n{match[1]}:" in (ROOT / "Makefile").read_text(), name


def test_the_readme_lists_the_exit_statuses():
    listed = {
        int(status) for status in _first_column(ROOT / "README.md", "exit status")
    }
    for module in (flags, tokenize):
        assert listed == {
            module.FINISHED,
            module.FAILED,
            module.WRONG_INPUT,
            module.RESUMABLE,
        }


def test_the_readme_lists_every_command():
    programs = {
        f"python -m jaxllm.{path.stem}"
        for path in (ROOT / "jaxllm").glob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text()
    } | {
        f"python -m jaxllm.{path.parent.name}"
        for path in (ROOT / "jaxllm").glob("*/__main__.py")
    }
    assert set(_first_column(ROOT / "README.md", "command")) == programs


def test_the_readme_says_how_many_lines_its_reading_path_has():
    text = (ROOT / "README.md").read_text()
    words = " ".join(text.split())
    _, _, story = words.partition("The path of one training step is about ")
    promised = int(story.split()[0].replace(",", ""))
    path = re.findall(r"`(jaxllm/[\w/]+\.py)`", story.partition("[How it works]")[0])
    assert len(path) > 10
    counted = sum(len((ROOT / name).read_text().splitlines()) for name in path)
    assert abs(counted - promised) <= 0.05 * promised, counted
    assert len(text.splitlines()) < 200


def test_the_terms_are_in_order_and_the_tables_are_those_of_the_code():
    page = ROOT / "docs" / "terms.md"
    terms = _first_column(page, "term")
    assert len(terms) > 60
    assert terms == sorted(terms, key=lambda term: term.lower().replace("-", " "))
    _, _, table = page.read_text().partition("| STORAGE |\n|---|---|---|---|---|\n")
    rows = [
        [cell.strip() for cell in row.replace("`", "").split("|")[1:-1]]
        for row in table.split("\n\n")[0].splitlines()
    ]
    assert [tuple(row[:2]) for row in rows] == list(LETTERS.items())
    for letter, _, *written in rows:
        tables = (rules.COMPUTE, rules.RESIDUAL, rules.STORAGE)
        assert written == [", ".join(table.get(letter, ())) for table in tables], letter


def test_documents_are_ascii_and_fit_a_screen():
    for document in DOCUMENTS:
        for line in document.read_text(encoding="ascii").splitlines():
            assert len(line) <= 88 or line.startswith("|"), f"{document.name}: {line}"


def _file_name(text: str) -> Path | None:
    """Returns the path that a block names in its first line, if it does."""
    match = re.match(r"# (\w+/\w+\.py)\n", text)
    return Path(match[1]) if match else None


def _first_column(document: Path, header: str) -> list[str]:
    """Returns the first cells of the table whose first header cell is this."""
    _, _, table = document.read_text().partition(f"| {header} |")
    rows = table.split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip().strip("`") for row in rows]


def _known_options() -> set[str]:
    # Called, or in a table of flags.
    defined = re.compile(r'DEFINE_\w+[(,]\s*"(\w+)"')
    names = {"help", "helpfull", *(f"config.{name}" for name in setting_types())}
    for path in (ROOT / "jaxllm").rglob("*.py"):
        for match in defined.finditer(path.read_text()):
            names.add(match[1])
    return names


def _resolve(name: str):
    """Imports what a dotted name names: a module, or something in one."""
    module, _, member = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), member), name
