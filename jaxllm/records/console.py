# SPDX-License-Identifier: Apache-2.0
"""The console of a run: a progress bar on a terminal, plain lines elsewhere."""

import datetime
import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

_SHOWN = {  # of a logged step, in this order
    "loss": "loss {:.4g}".format,
    "eval_loss": "eval_loss {:.4f}".format,
    "grad_norm": "grad_norm {:.3g}".format,
    "lr": "lr {:.1e}".format,
    "tokens_per_s": lambda number: f"{_short(number)} tok/s",
    "step_s": "{:.3g} s/step".format,
    "mfu": lambda share: f"mfu {100 * share:.0f} %",
}


class Console:
    """Shows logged steps; a context manager that removes its progress bar at the end.

    Args:
      num_steps: the steps of the whole run.
      file: where to write; standard output if None.
    """

    def __init__(self, num_steps: int, *, file: TextIO | None = None):
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # step and time it was shown
        self._file = file or sys.stdout
        self._progress: Progress | None = None
        if self._file.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                console=RichConsole(file=self._file, highlight=False),
                expand=True,
                refresh_per_second=2,
            )
            self._task = self._progress.add_task(
                "starting",
                total=num_steps,
                text="",
            )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, record: Mapping[str, float]) -> None:
        """Shows a record as a line: `step` and the metrics it has."""
        step, text = int(record["step"]), describe(record)
        name = f"step {step}/{self._num_steps}"
        if "eval_loss" in record:
            self.say(f"{name} {text}")
            return
        text = f"{text} eta {self._eta(step)}"
        if self._progress is None:
            self.say(f"{name} {text}")
        else:
            self._progress.update(
                self._task, description=name, completed=step + 1, text=text
            )

    def say(self, text: str) -> None:
        """Prints a line unchanged, above the progress bar if there is one."""
        if self._progress is None:
            print(text, file=self._file, flush=True)
        else:
            self._progress.console.print(text, markup=False, soft_wrap=True)

    def take_logs(self, level: int = logging.INFO) -> None:
        """Shows log messages: ours of a level and above, warnings of others."""
        handler = _ConsoleHandler(self)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(
            lambda record: (
                record.levelno >= logging.WARNING or record.name.startswith("jaxllm")
            )
        )
        root = logging.getLogger()
        root.handlers = [handler]
        root.setLevel(logging.WARNING)
        logging.getLogger("jaxllm").setLevel(level)

    def _eta(self, step: int) -> str:
        """Returns the time left, by the steps since the first one shown here."""
        now_s = time.monotonic()
        if self._first is None:
            self._first = (step, now_s)
        first_step, first_s = self._first
        if step == first_step:
            return "?"
        each_s = (now_s - first_s) / (step - first_step)
        return str(datetime.timedelta(seconds=round(each_s * (self._num_steps - step))))


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(self.format(record))


def describe(record: Mapping[str, float]) -> str:
    """Returns a line like "loss 3.21 lr 3.0e-04 12.3k tok/s 0.12 s/step mfu 41 %"."""
    known = {name: show for name, show in _SHOWN.items() if name in record}
    if math.isnan(record.get("mfu", 0.0)):  # a device of unknown speed
        known.pop("mfu")
    return " ".join(show(record[name]) for name, show in known.items())


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"
