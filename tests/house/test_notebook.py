# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom, and is the one that its script makes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"

# In a process of its own: Jupyter's event loops and warnings are not ours to judge.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.mark.slow
def test_the_notebook_runs_in_its_own_folder_and_learns(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    copy = Path(shutil.copy(NOTEBOOK, folder))
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
    }
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(copy)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "notebook" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if "loss" in record]
    evals = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert losses[-1] < 0.75 * losses[0]
    assert len(evals) == 2
    outputs = [cell["outputs"] for cell in _cells(copy) if cell["cell_type"] == "code"]
    assert any("image/png" in each.get("data", {}) for part in outputs for each in part)


def test_the_notebook_is_the_one_that_its_script_makes():
    made = jupytext.read(NOTEBOOK.with_suffix(".py"))
    saved = [(cell["cell_type"], cell["source"]) for cell in _cells(NOTEBOOK)]
    assert saved == [(cell["cell_type"], cell["source"]) for cell in made.cells], (
        "notebooks/quickstart.ipynb is not current; make it with `make notebook`"
    )


def test_the_notebook_has_no_outputs():
    for cell in _cells(NOTEBOOK):
        assert not cell.get("outputs") and cell.get("execution_count") is None


def _cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells
