"""Our handle on the process with math-verify imported, from which workers are forked.

Nothing here waits: a fork is asked for, and the new worker says hello on a socket of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


class Nursery:
    """One `python -m sse_rewards.worker`; see there for what it is told."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        """Readable only when the nursery is dead."""
        self.proven = False
        """Whether a worker of it came up."""
        package = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([package, *(entry for entry in sys.path if entry)])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sse_rewards.worker"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": path, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def fork(self) -> socket.socket:
        """Our end of the socket of a worker to come."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # a dead nursery shows as the socket's end
            socket.send_fds(self.socket, [b"fork".ljust(12)], [theirs.fileno()])
        return ours

    def kill(self, process_id: int) -> None:
        """Kill a worker that this nursery forked and has not reaped."""
        with contextlib.suppress(OSError):
            os.kill(process_id, signal.SIGKILL)
            self.socket.sendall(b"%12d" % process_id)

    def close(self) -> None:
        """End the process and with it every worker it forked."""
        self.socket.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def cpu_seconds(process_id: int) -> float:
    """Processor time that a process has used; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
