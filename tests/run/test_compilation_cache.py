# SPDX-License-Identifier: Apache-2.0
"""Compiled programs on disk: kept between processes, damaged ones replaced."""

import zlib
from pathlib import Path

import pytest

COMPILE = """
import jax, jax.numpy as jnp
from jaxllm.run.compilation_cache import use_compilation_cache

use_compilation_cache()
use_compilation_cache()

@jax.jit
def square(x):
    return x @ x

@jax.jit
def cube(x):
    return x @ x @ x

events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
for function, size in ((square, 4), (square, 5), (cube, 4)):
    jax.block_until_ready(function(jnp.ones((size, size))))
print(events.count("/jax/compilation_cache/cache_misses"))
"""


@pytest.fixture
def start_compiling(start_training, tmp_path):
    """Compiles three programs in a new process, with a cache in tmp_path/cache."""

    def start(log: str):
        env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        return start_training(["-c", COMPILE], tmp_path, tmp_path / log, env)

    return start


@pytest.fixture
def compile_all(start_compiling, tmp_path):
    """Does so; returns what it said: damaged entries, and how many it wrote."""

    def run() -> list[str]:
        assert start_compiling("log").wait() == 0
        return (tmp_path / "log").read_text().splitlines()

    return run


def programs(folder: Path) -> list[Path]:
    found = [*folder.glob("cache/jit_square-*-cache")]
    return sorted([*found, *folder.glob("cache/jit_cube-*-cache")])


DAMAGES = {
    "cut off": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "overwritten": lambda whole: whole[:100] + bytes(200) + whole[300:],
    "something else": lambda whole: b"x" * len(whole),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_replaced_and_whole_ones_are_kept(
    damage, compile_all, tmp_path
):
    compile_all()
    assert compile_all() == ["0"]
    cube, square, other = programs(tmp_path)
    kept = other.stat().st_mtime_ns
    for path in (cube, square):
        path.write_bytes(damage(path.read_bytes()))
    *said, written = compile_all()
    assert written == "2"
    assert sorted(line.rpartition(":")[2] for line in said) == [
        f"{path} was damaged; it is compiled and written anew."
        for path in (cube, square)
    ]
    for path in (cube, square):
        zlib.decompress(path.read_bytes())
    assert other.stat().st_mtime_ns == kept
    assert compile_all() == ["0"]


def test_processes_that_meet_a_damaged_entry_together_leave_it_whole(
    start_compiling, compile_all, tmp_path
):
    compile_all()
    for path in programs(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    processes = [start_compiling(f"log{number}") for number in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(programs(tmp_path)) == 3
    for path in programs(tmp_path):
        zlib.decompress(path.read_bytes())
    assert compile_all() == ["0"]
