"""The processes that touch sympy: a nursery that imports it once, and its killable children.

`python -m sse_rewards.worker` is the nursery. Its standard input is a socket to the parent: a
message with a socket attached asks for a child that serves it, one without names a dead child to
reap, so that an id stays taken until the parent is done with it. Messages are twelve bytes. When
the parent's end closes, were it by kill -9, the nursery kills its children and leaves.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

MEMORY_LIMIT = 2 << 30
RECURSION_LIMIT = 5000
"""Deep enough for any answer within the size limits."""
DIGIT_LIMIT = 20_000
WARM_UP = (
    (r"\lfloor\frac{n}{2}\rfloor+\sqrt[3]{x}", r"\lfloor n/2\rfloor-\sinh(2x)"),
    (r"3\log x - \log_2{5}", r"\log\frac{x^3}{2}"),
    (r"-2\arccos\left(\frac{y}{2}\right)\cdot e^{-x}", r"(x+1)^{2}\pi-\arcsin y"),
)
"""The grammar is slow on what it sees for the first time; the nursery learns it when idle."""
FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
FORBIDDEN_ALONE = {"os.system", "os.remove", "os.rename", "os.rmdir", "os.kill"}


def nursery() -> None:
    """Import math-verify, then fork a child for every socket received."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = socket.socket(fileno=os.dup(0))
    from . import compare
    from .symbolic import same_mathematics

    assert compare.answers_equal(r"\arctan x", r"\arctan(x)+0", same_mathematics)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    unseen = list(WARM_UP)
    children: set[int] = set()
    while True:
        while unseen and not select.select([parent], [], [], 0)[0]:
            same_mathematics(*unseen.pop())
        message, sockets, _, _ = socket.recv_fds(parent, 12, 1)
        if not message:
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
            return
        if not sockets:
            if int(message) in children:
                children.remove(int(message))
                os.waitpid(int(message), 0)
            continue
        gc.freeze()
        child = os.fork()
        if child == 0:
            parent.close()
            _serve(socket.socket(fileno=sockets[0]))
            os._exit(0)
        children.add(child)
        os.close(sockets[0])


def _serve(parent: socket.socket) -> None:
    """Say hello, then answer questions, one JSON line each, until the socket closes. JSON escapes
    everything but ASCII, lone surrogates too."""
    from .compare import answers_equal
    from .symbolic import same_mathematics

    _confine()
    parent.sendall(json.dumps({"process_id": os.getpid()}).encode() + b"\n")
    lines = parent.makefile("rb")
    for line in lines:
        question: dict[str, Any] = json.loads(line)
        _limit_cpu(question["seconds"])
        try:
            verdict = answers_equal(question["prediction"], question["gold"], same_mathematics)
            reply: dict[str, Any] = {"equal": verdict}
        except (MemoryError, RecursionError) as failure:
            reply = {"error": f"{type(failure).__name__} in the symbolic check"}
        except Exception as failure:  # sympy raises anything; here failing means 0
            reply = {"equal": None, "reason": f"{type(failure).__name__}: {failure}"[:200]}
        usage = resource.getrusage(resource.RUSAGE_SELF)
        reply["rss"] = usage.ru_maxrss << 10
        parent.sendall(json.dumps(reply).encode() + b"\n")


def _confine() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.set_int_max_str_digits(DIGIT_LIMIT)
    sys.addaudithook(_forbid)


def _limit_cpu(seconds: float) -> None:
    """A second line of defence, should the parent be stopped: SIGXCPU ends a check that spins."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(FORBIDDEN) or event in FORBIDDEN_ALONE:
        raise PermissionError(f"{event} in a reward worker")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise PermissionError("a reward worker writes no files")


if __name__ == "__main__":
    nursery()
