# SPDX-License-Identifier: Apache-2.0
"""Runs the entry points as users do, without importing JAX each time anew.

Reads one request a line, forks for each, runs the module there as `__main__` to the
very end of the process, and answers with its exit status. Nothing here may start
JAX's backend, whose threads a fork would lose.
"""

import json
import os
import runpy
import signal
import sys

import jax

import jaxllm.evaluate
import jaxllm.generate

# Imported for the forks to have them.
import jaxllm.records.console
import jaxllm.run.run
import jaxllm.tokenize  # noqa: F401

LIMIT_S = 300


def next_request() -> dict | None:
    """Returns a request, in a fork of this process; None once there are no more."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            return json.loads(line)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def prepare(request: dict):
    """Makes this process what a shell would have started."""
    signal.alarm(LIMIT_S)
    os.chdir(request["folder"])
    os.environ.update(request["env"])
    if devices := request["env"].get("JAX_NUM_CPU_DEVICES"):
        jax.config.update("jax_num_cpu_devices", int(devices))
    sys.path[0] = ""
    sys.argv = [request["module"], *request["arguments"]]
    sys.modules.pop(request["module"], None)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)


if request := next_request():
    prepare(request)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
