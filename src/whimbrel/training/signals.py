"""SIGINT and SIGTERM as a wish to stop after the step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(peers: Sequence[int] = ()) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as usual.

    peers: process ids on this machine of those that a step needs. Where one of them is gone when a signal comes, there
    will be no further step nor checkpoint, and this process ends at once, also from within a call that waits for ever.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[number])

    with _told_of_signals(peers):
        for number in before:
            signal.signal(number, on_signal)
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _told_of_signals(peers: Sequence[int]) -> Iterator[None]:
    """A thread that looks for the peers when a signal comes.

    What `signal.signal` takes is called by the main thread between two steps of Python, so never while it waits for a
    device; a byte in a pipe comes at once.
    """
    if not peers:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if not all(map(_lives, peers)):
                os._exit(128 + number)

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
