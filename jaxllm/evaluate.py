# SPDX-License-Identifier: Apache-2.0
"""Measures a run's loss on held-out tokens.

python -m jaxllm.evaluate --workdir runs/x [--step best] [--config.eval.batches=0]
"""

import json

from absl import flags as absl_flags

from jaxllm import flags
from jaxllm.cluster import agreement, membership
from jaxllm.run.compilation_cache import use_compilation_cache
from jaxllm.run.evaluation import evaluate_run
from jaxllm.run.saved_model import read_step


def main(argv: list[str]):
    del argv
    config, workdir = flags.config_from_flags(), flags.workdir_from_flags()
    which = read_step(absl_flags.FLAGS.step)
    membership.join(config.distributed)
    use_compilation_cache()
    result = evaluate_run(workdir, config, which)
    if agreement.is_lead():
        print(json.dumps(result))


if __name__ == "__main__":
    flags.define_config_flags()
    absl_flags.DEFINE_string(
        "step", "latest", "checkpoint to evaluate: a step, latest or best"
    )
    flags.run(main)
