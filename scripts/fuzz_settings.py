# SPDX-License-Identifier: Apache-2.0
"""Plans runs whose settings are drawn at random, as --dry_run does.

JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python scripts/fuzz_settings.py 1000 [--seed 0]

Each draw must be planned, or refused with a message, within seconds. Exit status: 0 all
were; 1 one had a traceback or took too long: its settings are printed.
"""

import argparse
import collections
import random
import signal
import sys
import traceback
import typing
from collections.abc import Iterator
from typing import Any, Literal

import jax

from jaxllm.config import Config, DataConfig, OptimizerConfig, override, presets
from jaxllm.config.fields import setting_types
from jaxllm.errors import WRONG_INPUT
from jaxllm.flags import explain
from jaxllm.train import dry_run

LIMIT_S = 10.0  # seconds of this process for one draw
BASE = Config(
    steps=100,
    model=presets.tiny_1m(),
    data=DataConfig(paths=("none",), sequence_length=64, batch_size=8),
    optimizer=OptimizerConfig(lr=1e-3),
)
INTS = [-(2**63), -1, 0, 1, 2, 3, 4, 8, 16, 64, 2**10, 2**16, 2**20, 10**9, 2**31 - 1]
INTS += [2**31, 2**32, 2**53, 10**20, 10**400]
FLOATS = [-1.0, -0.0, 0.0, 1e-320, 1e-60, 1e-38, 1e-30, 1e-8, 1e-3, 0.1, 0.5, 1.0]
FLOATS += [1 - 1e-12, 1.5, 2.0, 100.0, 1e8, 1e38, 1e39, 1e308]
FLOATS += [float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "none",
    "nan",
    "-inf",
    "1e5",
    "1e400",
    "1_0",
    "0x10",
    "(",
    "(1,",
    "[]",
]
TEXTS += ["True", "adamw", "\0", "\ud800", "\u0661", "9" * 5000, "a,b", "1e99999999999"]


class TooLong(Exception):
    """A draw took more than its seconds."""


def draw_settings(rng: random.Random) -> dict[str, Any]:
    """Returns overrides for `BASE`: some settings, each with a value at random."""
    kinds = setting_types()
    names = rng.sample(list(kinds), rng.choice([1, 1, 2, 3, 5, 8]))
    is_mild = rng.random() < 0.6  # values that are refused hide what comes after
    return {name: _draw(rng, kinds[name], is_mild) for name in names}


def _draw(rng: random.Random, kind: Any, is_mild: bool) -> Any:
    if not is_mild and rng.random() < 0.15:
        return rng.choice([None, True, (), [], *INTS, *FLOATS, *TEXTS])
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return rng.choice(choices)
    if typing.get_origin(kind) is tuple:
        length = rng.choice([1, 1, 2, 3] if is_mild else [0, 1, 2, 7, 1000])
        return tuple(_draw(rng, choices[0], is_mild) for _ in range(length))
    if choices:  # int | None
        return _draw(rng, rng.choice(choices), is_mild)
    if kind is int and is_mild:
        return rng.choice([0, 1, 1, 2, 2, 3, 4, 4, 8, 8, 16, 64, 1000, 2**16])
    if kind is float and is_mild:
        return rng.choice([0.0, 1e-6, 0.1, 0.5, 0.9, 1.0, 1.5, 10.0, 1e4])
    values = {int: INTS, float: FLOATS, bool: [False, True], str: TEXTS}
    return rng.choice(values.get(kind, [None]))


def find_faults(rng: random.Random, num_draws: int) -> Iterator[tuple[str, str]]:
    """Yields, for each draw, how it ended and, if that is a fault, its report."""
    for number in range(num_draws):
        settings = draw_settings(rng)
        try:
            end, report = _plan(settings), ""
        except Exception:
            end, report = "failed", traceback.format_exc()
        yield end, f"{settings!r:.2000}\n{report}" if end == "failed" else ""
        if number % 200 == 199:
            jax.clear_caches()


def _plan(settings: dict[str, Any]) -> str:
    """Returns whether a run was planned or refused; raises everything else."""
    handler = signal.signal(signal.SIGPROF, _stop)
    # By the time of this process: others may have the machine.
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        dry_run(override(BASE, settings))
        return "planned"
    except Exception as error:
        status, message = explain(error) or (None, "")
        if status != WRONG_INPUT or not message:
            raise
        message.encode()  # it can be printed
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def _stop(*_: object):
    raise TooLong(f"more than {LIMIT_S:.0f} s")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("draws", type=int, help="number of draws")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args(argv)
    ends: collections.Counter[str] = collections.Counter()
    for end, report in find_faults(random.Random(options.seed), options.draws):
        ends[end] += 1
        if report:
            print(report, flush=True)
    print(", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    return 1 if ends["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
