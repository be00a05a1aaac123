# SPDX-License-Identifier: Apache-2.0
"""The proof that a process knows the name of its job, without saying it.

It is an HMAC over a number that the other side has just drawn. Only the messages of the
door have it; what two processes say later is neither encrypted nor signed.
"""

import hashlib
import hmac
import json
from typing import Any

LINE_BYTES = 2**12  # of a message, and of what is read before its sender is known


def key_of(job: str) -> bytes:
    """Returns the key of a job."""
    return hashlib.sha256(job.encode()).digest()


def seal(key: bytes, nonce: str, fields: dict[str, Any]) -> bytes:
    """Returns a line with the proof that its sender knows the key.

    Args:
      key: of the job.
      nonce: the number that the receiver has drawn.
      fields: of the message.
    """
    body = json.dumps(fields)
    sealed = {"body": body, "proof": _proof(key, nonce, body)}
    return json.dumps(sealed).encode() + b"\n"


def unseal(key: bytes, nonce: str, line: bytes) -> dict[str, Any] | None:
    """Returns the fields of a line; None if its sender has another key.

    Raises:
      ValueError, TypeError, KeyError, RecursionError: it is no such line.
    """
    sealed = json.loads(line)
    body = sealed["body"]
    if not hmac.compare_digest(sealed["proof"], _proof(key, nonce, body)):
        return None
    return json.loads(body)


def _proof(key: bytes, nonce: str, body: str) -> str:
    return hmac.new(key, f"{nonce} {body}".encode(), "sha256").hexdigest()
