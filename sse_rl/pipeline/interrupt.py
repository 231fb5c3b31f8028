"""SIGTERM and Ctrl-C as an exception that is raised where stopping is safe."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sse_rl.errors import Interrupted


@contextmanager
def stop_signal() -> Iterator[Callable[[], None]]:
    """A function that raises Interrupted after SIGTERM or Ctrl-C; a second Ctrl-C stops at once.

    Enter it after Ray has started: Ray installs handlers of its own.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Interrupted

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
