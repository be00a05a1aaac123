# SPDX-License-Identifier: Apache-2.0
"""What decides the batches of a run: saved with it, and compared when it resumes."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from jaxllm.config import DataConfig
from jaxllm.data.formats import TokenSplit

# Raised when the same settings begin to give other batches: what changed, by version.
ORDER_CHANGES = {
    2: "the first token of a document is a target too, predicted from the "
    "end-of-document token before it, so that rows begin at other tokens"
}
ORDER_VERSION = max(ORDER_CHANGES)


def data_fingerprint(
    config: DataConfig, splits: Sequence[TokenSplit]
) -> dict[str, Any]:
    """Returns what, with the seed, decides every batch; it can be written as JSON.

    Tokens are known by their content: a file may be moved without being another.
    "config.data.end_of_document" has the token that a document is predicted from, of
    each path; None where the first token of a document is no target.
    """
    tokenizers = sorted({split.tokenizer for split in splits if split.tokenizer})
    return {
        "order_version": ORDER_VERSION,
        "config.data.paths": [split.fingerprint for split in splits],
        "config.data.end_of_document": [split.end_of_document for split in splits],
        "config.data.weights": list(config.weights),
        "config.data.sequence_length": config.sequence_length,
        "config.data.batch_size": config.batch_size,
        "config.data.packing": config.packing,
        "config.data.shuffle": config.shuffle,
        "tokenizer": tokenizers,
    }


def eval_fingerprint(
    config: DataConfig, splits: Sequence[TokenSplit], num_batches: int
) -> str:
    """Returns a hash of what decides the rows of an evaluation.

    Two losses can be compared if theirs are equal.
    """
    decides = {
        "order_version": ORDER_VERSION,
        "splits": [(split.fingerprint, split.end_of_document) for split in splits],
        "packing": config.packing,
        "cross_document_attention": config.cross_document_attention,
        "sequence_length": config.sequence_length,
        "rows": num_batches * config.batch_size,
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def describe_change(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Returns why two fingerprints give different batches; None if they do not."""
    was, now = old["order_version"], new["order_version"]
    if was != now:
        since = [text for version, text in ORDER_CHANGES.items() if version > was]
        what = f" {'; '.join(since)}" if since else ""
        return (
            f"the run was begun by a version of jaxllm with rows of order {was}, and "
            f"this one makes rows of order {now}:{what or ' it is older'}. Continue it "
            "with the version that began it, or start in another --workdir."
        )
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if not changed:
        return None
    changes = []
    for name in changed:
        was, now = old.get(name), new.get(name)
        if name == "config.data.paths":
            changes.append(_describe_paths(was or [], now or []))
        else:
            changes.append(f"{name} was {_show(was)} and is now {_show(now)}")
    return (
        f"{'; '.join(changes)}: the batches would not be those of the run so far. "
        "Give it back its old value, or start in another --workdir."
    )


def _describe_paths(old: list[str], new: list[str]) -> str:
    if len(old) != len(new):
        return f"config.data.paths was {len(old)} paths and is now {len(new)}"
    numbers = [str(i) for i in range(len(old)) if old[i] != new[i]]
    if sorted(old) == sorted(new):
        return f"config.data.paths has another order, at {', '.join(numbers)}"
    return f"the tokens of config.data.paths changed, at {', '.join(numbers)}"


def _show(value: Any) -> str:
    return "none" if value is None or value == [] else str(value)
