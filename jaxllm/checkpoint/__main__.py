# SPDX-License-Identifier: Apache-2.0
"""Verifies the checkpoints of runs by their checksums.

python -m jaxllm.checkpoint verify runs/x [runs/y ...]

Every step, a few arrays at a time, on this machine's CPU or first GPU. Exit status: 0
all are what was saved, 1 one is not or cannot be read, 2 wrong input.
"""

from pathlib import Path

from jaxllm import flags
from jaxllm.checkpoint import find_steps, verify_step
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.errors import CheckpointError, InputError


def main(argv: list[str]) -> int:
    if argv[1:2] != ["verify"] or not argv[2:]:
        raise InputError("say `verify` and the directories of runs.")
    folders = [Path(workdir) / CHECKPOINTS for workdir in argv[2:]]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{folder.parent} has no {CHECKPOINTS}; give a run's directory."
            )
    return (
        flags.FINISHED if all([_verify(folder) for folder in folders]) else flags.FAILED
    )


def _verify(folder: Path) -> bool:
    """Prints a line a save; returns whether all of them are what was saved."""
    steps, faults = find_steps(folder)
    intact = all(fault.kind == "unfinished" for fault in faults.values())
    for path, fault in faults.items():
        print(f"{path}: {fault.text}; a resume ignores it")
    for step in steps:
        path = folder / str(step)
        try:
            number = verify_step(path)
            print(f"{path}: {'no checksums' if number is None else f'{number} arrays'}")
        except CheckpointError as error:
            print(f"{path}: {str(error).removeprefix(f'{path} ')}")
            intact = False
    if not steps and not faults:
        print(f"{folder}: no saves")
    return intact


if __name__ == "__main__":
    flags.run(main, positionals=True)
