# SPDX-License-Identifier: Apache-2.0
"""Verifies the checkpoints of runs by their checksums.

python -m jaxllm.checkpoint verify runs/x [runs/y ...]

Every whole step, array by array, on this machine's CPU or first GPU. Exit status: 0 all
are what was saved, 1 one is not, 2 wrong input.
"""

from pathlib import Path

from jaxllm import flags
from jaxllm.checkpoint import find_steps, verify_step
from jaxllm.checkpoint.steps import CHECKPOINTS
from jaxllm.errors import CheckpointError, InputError


def main(argv: list[str]) -> int:
    if argv[1:2] != ["verify"] or not argv[2:]:
        raise InputError("say `verify` and the directories of runs.")
    status = flags.FINISHED
    for workdir in map(Path, argv[2:]):
        folder = workdir / CHECKPOINTS
        if not folder.is_dir():
            raise InputError(f"{workdir} has no {CHECKPOINTS}; give a run's directory.")
        steps, faults = find_steps(folder)
        for path, fault in faults.items():
            print(f"{path}: {fault}; a resume ignores it")
        for step in steps:
            try:
                print(f"{folder / str(step)}: {verify_step(folder / str(step))} arrays")
            except CheckpointError as error:
                print(f"{folder / str(step)}: {error}")
                status = flags.FAILED
    return status


if __name__ == "__main__":
    flags.run(main, positionals=True)
