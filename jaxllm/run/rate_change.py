# SPDX-License-Identifier: Apache-2.0
"""Tells whether the learning rate jumps where a run goes on with other settings."""

import logging
from pathlib import Path

from jaxllm.config import Config
from jaxllm.config.files import config_from_dict
from jaxllm.config.saved import read_values
from jaxllm.errors import InputError
from jaxllm.step.optimizer import make_schedule

_log = logging.getLogger(__name__)
_RTOL = 1e-4


def warn_of_rate(workdir: Path, config: Config, step: int) -> None:
    """Warns if the settings so far had another learning rate at the step of a resume.

    More steps make a cosine rise again, from its end to a point on the way.

    Args:
      workdir: of the run, with the config.json of the start before.
      config: of this start.
      step: at which it resumes.
    """
    values = read_values(workdir)
    if values is None or step == 0:
        return
    try:
        before = config_from_dict(values)
    except InputError:  # of another version
        return
    was, now = (
        float(make_schedule(each.optimizer, each.steps)(step))
        for each in (before, config)
    )
    if abs(now - was) > _RTOL * was:
        _log.warning(
            "the learning rate at step %d %s from %.4g to %.4g with the new settings; "
            "to go on at the rate so far, add --config.optimizer.schedule=constant "
            "--config.optimizer.lr=%.4g",
            step,
            "rises" if now > was else "falls",
            was,
            now,
            was,
        )
