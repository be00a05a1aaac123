# SPDX-License-Identifier: Apache-2.0
"""What a benchmark run is asked for; passed to its worker processes as JSON."""

import dataclasses
import json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A run of `python -m pallas_kernels.bench`."""

    operations: tuple[str, ...] = ()  # folders of operations
    part: str = ""  # of the names of cases; "" is all; commas separate several
    tune: bool = False  # time other tiles, and write the table of tiles
    dry: bool = False  # tiny cases on the CPU: proves the code, measures nothing
    peers: bool = True  # time other libraries too
    rounds: int = 9  # measurements of each implementation
    case_seconds: float = 6.0  # of timing a case, all implementations together
    until: float = 0.0  # `time.time()` after which no case starts
    folder: str  # of the files that workers and supervisor share

    def words(self) -> list[str]:
        """Returns what of a command line tells what was measured."""
        switches = {
            "--tune": self.tune,
            "--dry": self.dry,
            "--no_peers": not self.peers,
        }
        part = [f"--part={self.part}"] if self.part else []
        return [*self.operations, *part, *(w for w, on in switches.items() if on)]

    def dumps(self) -> str:
        """Returns what `loads` takes."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Options":
        """Returns the options that `dumps` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"operations": tuple(fields["operations"])})
