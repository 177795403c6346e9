"""A signal when a process that the next step needs is gone, and when it is not."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WAITS = """
import hashlib, os, sys
from whimbrel.training.signals import stop_signals

with stop_signals([int(sys.argv[1])]) as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))  # nothing of Python runs meanwhile
    print("stop" if stop.is_set() else "went on", flush=True)
"""


@pytest.mark.parametrize("alive", [True, False])
def test_a_signal_ends_a_process_that_waits_for_a_dead_one(alive: bool):
    peer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    rounds = 2_000_000 if alive else 10**9
    process = subprocess.Popen([sys.executable, "-c", WAITS, str(peer.pid), str(rounds)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if not alive:
            peer.kill()
            peer.wait()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == ((0, b"stop\n") if alive else (128 + signal.SIGTERM, b""))
    finally:
        for one in (process, peer):
            one.kill()
            one.wait()
