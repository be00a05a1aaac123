# SPDX-License-Identifier: Apache-2.0
"""A batch is a pure function of (tokens, settings, seed, step), on any mesh."""

import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.data import batches as batches_module
from jaxllm.data.batches import check_memory
from jaxllm.data.formats import TokenSplit
from jaxllm.data.packing import pack_all
from jaxllm.errors import InputError
from sharding import Placement

LENGTH, BATCH = 16, 8
END = 2**30  # the token before the first document
NAMES = ("tokens", "targets", "segments", "positions")


def make_split(num_documents=60, *, first_token=0, seed=0) -> TokenSplit:
    sizes = np.random.default_rng(seed).integers(2, 40, num_documents)
    ends = np.cumsum(sizes)
    return TokenSplit(
        path=f"tokens-{first_token}",
        shards=(first_token + np.arange(ends[-1], dtype=np.int32),),
        document_ends=ends,
        end_of_document=END,
        vocab_size=2**31,
        vocab_known=False,
        fingerprint=f"{first_token}",
        tokenizer=None,
    )


SPLITS = (make_split(), make_split(25, first_token=10_000, seed=1))


def make_config(num_paths=1, **settings) -> DataConfig:
    return DataConfig(
        **{
            "paths": tuple(f"path-{i}" for i in range(num_paths)),
            "sequence_length": LENGTH,
            "batch_size": BATCH,
            **settings,
        }
    )


def load_batches(config, splits, **options):
    packed = pack_all(config, splits, keep_tail=False)
    return batches_module.load_batches(config, packed, **options)


def eval_batches(config, splits, **options):
    packed = pack_all(config, splits, keep_tail=True)
    return batches_module.eval_batches(config, packed, **options)


def take(config, splits, steps, *, seed=0, sharding=None, start=0):
    with load_batches(
        config, splits, seed=seed, sharding=sharding, start=start
    ) as batches:
        return [to_host(next(batches)) for _ in range(steps)]


def to_host(batch):
    return {name: np.asarray(values) for name, values in batch.items()}


def stack(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in NAMES}


def assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


PIPELINES = {
    "concat": (make_config(), SPLITS[:1]),
    "best_fit": (make_config(packing="best_fit"), SPLITS[:1]),
    "mixture": (make_config(2, weights=(0.7, 0.3)), SPLITS),
    "mixture by size": (make_config(2, packing="best_fit"), SPLITS),
    "in order": (make_config(2, shuffle=False), SPLITS),
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("start", [1, 13, 40])
def test_a_resumed_run_sees_the_batches_of_an_undisturbed_one(name, start):
    config, splits = PIPELINES[name]
    undisturbed = take(config, splits, 45)
    assert_equal(take(config, splits, 45 - start, start=start), undisturbed[start:])


def test_prefetch_changes_nothing_and_the_seed_everything():
    config, splits = PIPELINES["mixture"]
    reference = take(config, splits, 5)
    deeper = make_config(2, weights=(0.7, 0.3), prefetch=9)
    assert_equal(take(deeper, splits, 5), reference)
    other = take(config, splits, 5, seed=1)
    assert not np.array_equal(other[0]["tokens"], reference[0]["tokens"])


SHARDINGS = {
    "rows": ((8,), ("data",), jax.P("data")),
    "rows over two axes": ((4, 2), ("data", "fsdp"), jax.P(("data", "fsdp"))),
    "rows, replicated": (
        (2, 2, 2),
        ("data", "fsdp", "tensor"),
        jax.P(("data", "fsdp")),
    ),
    "columns": ((8,), ("context",), jax.P(None, "context")),
    "rows and columns": ((2, 4), ("data", "context"), jax.P("data", "context")),
    "columns before rows": ((2, 4), ("context", "data"), jax.P("data", "context")),
    "one copy each": ((8,), ("tensor",), jax.P()),
}


def make_sharding(name) -> jax.NamedSharding:
    sizes, axes, spec = SHARDINGS[name]
    kinds = (jax.sharding.AxisType.Explicit,) * len(axes)
    return jax.NamedSharding(jax.make_mesh(sizes, axes, axis_types=kinds), spec)


@pytest.mark.parametrize("name", SHARDINGS)
def test_batches_are_the_same_on_every_mesh(name):
    config, splits = PIPELINES["mixture"]
    sharding = make_sharding(name)
    assert_equal(take(config, splits, 4, sharding=sharding), take(config, splits, 4))
    with load_batches(config, splits, seed=0, sharding=sharding) as batches:
        for values in next(batches).values():
            assert values.sharding == sharding
            assert values.shape == (BATCH, LENGTH)
            assert values.dtype == np.int32


class OneHost:
    """A sharding as one process of several sees it."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        index_map = self.sharding.devices_indices_map(shape)
        return {device: index_map[device] for device in self.devices}


@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("num_hosts", [2, 4, 8])
def test_a_host_reads_the_rows_of_its_devices_and_no_others(name, num_hosts):
    config, splits = PIPELINES["mixture"]
    whole = take(config, splits, 3)
    sharding = make_sharding(name)
    index_map = sharding.devices_indices_map((BATCH, LENGTH))
    for devices in np.array(jax.devices()).reshape(num_hosts, -1):
        seen_by_host: Any = OneHost(sharding, devices)
        with load_batches(config, splits, seed=0, sharding=seen_by_host) as batches:
            steps = batches.steps
        needed = {row for d in devices for row in range(BATCH)[index_map[d][0]]}
        assert steps.placement.rows.tolist() == sorted(needed)
        for step, batch in enumerate(whole):
            held = steps.read(step)
            for name, values in held.items():
                np.testing.assert_array_equal(values, batch[name][sorted(needed)])
                for device in devices:
                    np.testing.assert_array_equal(
                        steps.placement.part(values, device),
                        batch[name][index_map[device]],
                    )


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_trains_on_every_row_once_and_the_next_in_another_order(packing):
    config = make_config(batch_size=1, packing=packing)
    in_order = make_config(batch_size=1, packing=packing, shuffle=False)
    num_rows = len(pack_all(config, SPLITS[:1], keep_tail=False)[0])
    both = stack(take(config, SPLITS[:1], 2 * num_rows))
    first, second = both["tokens"][:num_rows], both["tokens"][num_rows:]
    expected = stack(take(in_order, SPLITS[:1], num_rows))["tokens"]
    for epoch in (first, second):
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert not np.array_equal(first, second)


def test_weights_are_the_share_of_rows():
    config, splits = PIPELINES["mixture"]
    rows = stack(take(config, splits, 10))
    from_second = (rows["tokens"] >= 10_000).any(axis=1)
    assert from_second.sum() == 0.3 * len(from_second)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_evaluation_takes_every_prediction_once(packing):
    config = make_config(2, packing=packing)
    with eval_batches(config, SPLITS, sharding=None, num_batches=0) as batches:
        rows = stack([to_host(batch) for batch in batches])
    taken = rows["targets"] >= 0
    found = list(zip(rows["tokens"][taken], rows["targets"][taken], strict=True))
    expected = {
        tuple(split.slice(at - 1, at + 1).tolist())
        for split in SPLITS
        for at in range(split.num_tokens)
    }
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(rows["tokens"]) % BATCH == 0
    assert (rows["segments"][-1] == 0).any()


def test_a_short_evaluation_takes_rows_spread_over_all():
    config = make_config(2)
    with eval_batches(config, SPLITS, sharding=None, num_batches=0) as batches:
        every_row = stack([to_host(batch) for batch in batches])
    with eval_batches(config, SPLITS, sharding=None, num_batches=2) as batches:
        some = stack([to_host(batch) for batch in batches])
    with eval_batches(config, SPLITS, sharding=None, num_batches=2) as batches:
        again = stack([to_host(batch) for batch in batches])
    assert_equal([some], [again])
    place = {tuple(row): i for i, row in enumerate(every_row["tokens"].tolist())}
    places = [place[tuple(row)] for row in some["tokens"].tolist()]
    used = int(np.count_nonzero(every_row["segments"].any(axis=1)))
    assert len(places) == 2 * BATCH
    steps = np.diff([*places, used])
    assert steps.max() - steps.min() <= 1


def test_an_evaluation_longer_than_its_data_stops_at_the_end():
    config = make_config()
    with eval_batches(config, SPLITS[1:], sharding=None, num_batches=0) as batches:
        every = [to_host(batch) for batch in batches]
    with eval_batches(config, SPLITS[1:], sharding=None, num_batches=99) as batches:
        assert_equal([to_host(batch) for batch in batches], every)


def test_an_evaluation_is_the_same_on_a_mesh():
    config = make_config()
    sharding = make_sharding("rows and columns")
    with eval_batches(config, SPLITS, sharding=None, num_batches=0) as batches:
        reference = [to_host(batch) for batch in batches]
    with eval_batches(config, SPLITS, sharding=sharding, num_batches=0) as batches:
        assert_equal([to_host(batch) for batch in batches], reference)


@pytest.fixture
def no_implicit_transfers():
    """Refuses them in all threads: `jax.transfer_guard` is of the one that enters it,
    and rows are placed in that of the batches."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    yield
    jax.config.update("jax_transfer_guard", before)


@pytest.mark.parametrize("place", [None, "rows"])
def test_transfers_are_explicit(place, no_implicit_transfers):
    config, splits = PIPELINES["mixture"]
    sharding = make_sharding(place) if place else None
    with load_batches(config, splits, seed=0, sharding=sharding) as batches:
        jax.block_until_ready([next(batches) for _ in range(6)])


@pytest.mark.parametrize("place", [None, "rows"])
def test_an_implicit_transfer_is_refused_in_the_thread_that_places_rows(
    place, no_implicit_transfers, monkeypatch
):
    threads = []

    def place_implicitly(placement, held):
        threads.append(threading.current_thread())
        return {name: jnp.negative(values) for name, values in held.items()}

    monkeypatch.setattr(Placement, "place", place_implicitly)
    config, splits = PIPELINES["mixture"]
    sharding = make_sharding(place) if place else None
    with load_batches(config, splits, seed=0, sharding=sharding) as batches:
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"
        ):
            jax.block_until_ready(next(batches))
    assert threads and threading.main_thread() not in threads


def test_a_token_above_the_vocabulary_is_refused_when_it_comes():
    config, splits = PIPELINES["mixture"]
    with load_batches(
        config, splits, seed=0, sharding=None, vocab_size=10_000
    ) as batches:
        with pytest.raises(
            InputError, match=r"tokens-10000 .*config\.model\.vocab_size"
        ):
            next(batches)


def test_closed_batches_leave_no_thread():
    before = set(threading.enumerate())
    batches = load_batches(make_config(), SPLITS[:1], seed=0, sharding=None)
    next(batches)
    (started,) = set(threading.enumerate()) - before
    batches.close()
    started.join(timeout=30)
    assert not started.is_alive()


def test_a_program_may_end_without_closing_its_batches(tmp_path):
    np.arange(5000, dtype="<u2").tofile(tmp_path / "train.bin")
    program = f"""
from jaxllm.config import DataConfig
from jaxllm.data.batches import load_batches
from jaxllm.data.packing import pack_all
from jaxllm.data.splits import open_train
config = DataConfig(paths=({str(tmp_path / "train.bin")!r},), sequence_length=16,
                    batch_size=4, end_of_document=7)
packed = pack_all(config, open_train(config), keep_tail=False)
batches = load_batches(config, packed, seed=0, sharding=None)
print(next(batches)["tokens"].shape)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(4, 16)\n", "")


class Slow(list):
    """Steps whose batches come only when they are let."""

    def __init__(self, number):
        super().__init__(range(number))
        self.let = threading.Event()

    def __getitem__(self, index):
        assert self.let.wait(30)
        return super().__getitem__(index)


def test_a_stop_is_heard_while_a_batch_is_waited_for():
    steps: Any = Slow(3)
    with batches_module.Batches(steps, 0, 1) as batches:
        asked = []
        assert batches.wait(lambda: bool(asked.append(0)) or len(asked) > 2) is None
        assert len(asked) == 3
        steps.let.set()
        assert [*batches] == [0, 1, 2]
        assert [*batches] == []


def test_an_error_of_the_thread_is_raised_where_the_batch_is_taken():
    steps: Any = Slow(3)
    steps.let.wait = lambda limit_s: False
    with batches_module.Batches(steps, 0, 1) as batches:
        with pytest.raises(AssertionError):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_a_program_may_end_while_a_read_hangs(tmp_path):
    program = """
import threading, time
from jaxllm.data import batches
batches._LEAVE_S = 0.2
class Hangs(list):
    def __getitem__(self, index):
        threading.Event().wait()
made = batches.Batches(Hangs([0]), 0, 1)
assert made.wait(lambda: True) is None
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("place", [None, "rows"])
@pytest.mark.parametrize(
    "settings, remedy",
    [
        ({"prefetch": 10**9}, r"use config\.data\.prefetch=\d+ or less"),
        ({"batch_size": 2**26}, r"lower config\.data\.batch_size"),
    ],
)
def test_batches_that_no_memory_can_hold_are_refused(settings, remedy, place):
    sharding = make_sharding(place) if place else None
    check_memory(make_config(), sharding)
    with pytest.raises(InputError, match=remedy) as caught:
        check_memory(make_config(**settings), sharding)
    (value,) = settings.values()
    assert str(value) in str(caught.value)
    assert "B of memory, and there are" in str(caught.value)
