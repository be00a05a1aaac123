# SPDX-License-Identifier: Apache-2.0
"""Prints the time of runs by kind, over all their restarts.

python -m jaxllm.ledger runs/x [runs/y ...]

It reads the ledger that a run writes, under way or ended, and touches no device.
"""

from pathlib import Path

from jaxllm import flags
from jaxllm.errors import InputError
from jaxllm.records.ledger import FILE, read_ledger


def main(argv: list[str]):
    workdirs = [Path(name) for name in argv[1:]]
    if not workdirs:
        raise InputError("name the directories of runs.")
    for workdir in workdirs:
        account = read_ledger(workdir)
        if not account.lives:
            raise InputError(f"{workdir} has no {FILE}; give the directory of a run.")
        print(f"{workdir}: {account.table()}")


if __name__ == "__main__":
    flags.run(main, positionals=True)
