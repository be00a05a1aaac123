# SPDX-License-Identifier: Apache-2.0
"""The console: plain lines in a file, a bar on a terminal."""

import io
import logging
import os
import pty
import re
import threading
import time

from jaxllm.records.console import Console, describe

RECORD = {
    "step": 99,
    "loss": 3.2104,
    "grad_norm": 0.8,
    "lr": 3e-4,
    "tokens_per_s": 12_345.0,
    "step_s": 0.12,
    "mfu": 0.414,
    "data_wait_s": 0.0,
}


def test_a_file_gets_plain_lines():
    file = io.StringIO()
    with Console(2000, file=file) as console:
        console.say("[model] 1M parameters")
        console.show(RECORD)
        console.show({"step": 100, "eval_loss": 2.5})
    lines = file.getvalue().splitlines()
    assert lines[0] == "[model] 1M parameters"
    assert re.fullmatch(
        r"step 99/2000 loss 3\.21 grad_norm 0\.8 lr 3\.0e-04 12\.3k tok/s "
        r"0\.12 s/step mfu 41 % eta \?",
        lines[1],
    )
    assert lines[2:] == ["step 100/2000 eval_loss 2.5000"]
    assert file.getvalue().isascii()


def test_a_line_shows_only_what_there_is():
    assert describe({"step": 1, "loss": float("nan"), "other": 3}) == "loss nan"
    for number, text in ((0.5, "0.5"), (999, "999"), (1e6, "1M"), (2.34e9, "2.34G")):
        assert describe({"tokens_per_s": number}) == f"{text} tok/s"


def test_the_remaining_time_counts_only_steps_of_this_process(monkeypatch):
    file = io.StringIO()
    with Console(1000, file=file) as console:
        console.show({"step": 900, "loss": 1.0})
        assert "eta ?" in file.getvalue()
        now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now_s + 10)
        console.show({"step": 910, "loss": 1.0})
    assert "eta 0:01:30" in file.getvalue()


def test_logs_of_ours_are_shown_and_warnings_of_others():
    file = io.StringIO()
    before = logging.getLogger().handlers
    try:
        with Console(10, file=file) as console:
            console.take_logs()
            logging.getLogger("jaxllm.run.run").info("compiled")
            logging.getLogger("absl").info("chatter")
            logging.getLogger("absl").warning("careful")
    finally:
        logging.getLogger().handlers = before
    assert file.getvalue().splitlines() == ["compiled", "careful"]


def test_a_terminal_gets_a_bar_with_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reader, terminal = pty.openpty()
    output = bytearray()

    def drain():
        try:
            while data := os.read(reader, 4096):
                output.extend(data)
        except OSError:
            pass  # the other end is closed

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        with os.fdopen(terminal, "w") as file, Console(200, file=file) as console:
            console.show(RECORD)
            console.show({"step": 100, "eval_loss": 2.5})
            console.show({**RECORD, "step": 150})
            console.say("[bold] is a word here")
    finally:
        thread.join()
        os.close(reader)
    text = output.decode()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "\x1b[" in text
    assert "step 150/200" in shown and "loss 3.21" in shown and "12.3k tok/s" in shown
    assert "eta 0:" in shown
    assert "step 100/200 eval_loss 2.5000" in shown
    assert "[bold] is a word here" in shown
