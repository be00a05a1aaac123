# SPDX-License-Identifier: Apache-2.0
"""Runs Python as users do, without importing JAX each time anew.

Reads one request a line, forks for each, and answers with the process id. The fork runs
a module, a script or a text as `__main__`, to the very end of the process; its exit
status is then in a file. Nothing here may start JAX's backend, whose threads a fork
would lose.
"""

import gc
import json
import os
import runpy
import signal
import sys
import types

import jax

import jaxllm.evaluate
import jaxllm.generate

# Imported for the forks to have them.
import jaxllm.records.console
import jaxllm.run.run
import jaxllm.tokenize  # noqa: F401
import pallas_kernels.offline  # noqa: F401

# What JAX has read from the environment when it was imported.
READ_BY_JAX = {
    "JAX_PLATFORMS": ("jax_platforms", str),
    "JAX_NUM_CPU_DEVICES": ("jax_num_cpu_devices", int),
    "JAX_ENABLE_COMPILATION_CACHE": ("jax_enable_compilation_cache", "true".__eq__),
    "JAX_COMPILATION_CACHE_DIR": (
        "jax_compilation_cache_dir",
        lambda path: path or None,
    ),
}


def next_request() -> dict | None:
    """Returns a request, in a fork of this process; None once there are no more."""
    for line in sys.stdin:
        if not os.fork():
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                return request
            print(pid, flush=True)
            _, status = os.waitpid(pid, 0)
            part = f"{request['ended']}.part"
            with open(part, "w") as file:
                file.write(str(os.waitstatus_to_exitcode(status)))
            os.rename(part, request["ended"])
            os._exit(0)
        while has_reaped(os.WNOHANG):
            pass
    while has_reaped(0):
        pass
    return None


def has_reaped(options: int) -> bool:
    """Waits for a fork, whose CPU time then counts as that of this process."""
    try:
        return os.waitpid(-1, options)[0] > 0
    except ChildProcessError:
        return False


def prepare(request: dict):
    """Makes this process what a shell would have started."""
    if request["limit_s"]:
        signal.alarm(request["limit_s"])
    os.chdir(request["folder"])
    os.environ.update(request["env"])
    for name, (option, read) in READ_BY_JAX.items():
        if name in request["env"]:
            jax.config.update(option, read(request["env"][name]))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)


def run(arguments: list[str]):
    """Does what `python` does with these arguments."""
    if arguments[0] == "-m":
        module, sys.path[0] = arguments[1], ""
        sys.argv = arguments[1:]
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


# Or each fork looks at all that was imported when it ends, and so copies it: 1.3 s of
# CPU time, not 0.2.
gc.freeze()
if request := next_request():
    prepare(request)
    run(request["python"])
