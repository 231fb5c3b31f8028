"""The pool: bombs, crashes, deadlines, and every way to call it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from sse_rewards import RewardPool

PATIENT = 60.0
"""A limit that honest checks keep even on a machine that is busy with other things."""
MIXED = [
    (r"\boxed{204}", "204", "aime"),
    (r"\boxed{205}", "204", "aime"),
    (r"\boxed{\frac{64}{2}}", "32", "math"),
    (r"\boxed{\arctan 1}", r"\frac{\pi}{4}", "math"),
    (r"\boxed{\arctan 2}", r"\frac{\pi}{4}", "math"),
    (r"\boxed{\log 100}", "2", "math"),
    (r"\boxed{x \ud800}", "x", "math"),
    (r"no box", "2", "math"),
]
MIXED_CORRECT = [True, False, True, True, False, True, False, False]


def bomb(n: int) -> tuple[str, str, str]:
    """Honest letters and small numbers that keep the symbolic engine busy for minutes."""
    return "\\boxed{" + f"{n}+" + r"\arcsin(" * 40 + "x" + ")" * 40 + "}", r"\arctan x", "math"


def honest(n: int) -> tuple[tuple[str, str, str], bool]:
    right = n % 3 != 0
    shown = n if right else n + 1
    if n % 10 == 0:
        return (rf"\boxed{{\arctan {shown}}}", rf"\arctan({n}) + 0", "math"), right
    if n % 2:
        return (rf"\boxed{{{shown}}}", str(n), "aime"), right
    return (rf"\boxed{{\frac{{{2 * shown}}}{{14}}}}", rf"\frac{{{n}}}{{7}}", "math"), right


def alive(process_id: int) -> bool:
    try:
        with open(f"/proc/{process_id}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process_ids: Iterable[int]) -> bool:
    """Whether all are gone, within half a minute."""
    end = time.monotonic() + 30
    while any(map(alive, process_ids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, process_ids))


def workers_of(process_id: int) -> list[int]:
    """The nursery of a process and its children."""
    found = [process_id]
    for pid in found:
        for tid in os.listdir(f"/proc/{pid}/task"):
            # A thread may end between the two: others have its children then.
            with suppress(FileNotFoundError), open(f"/proc/{pid}/task/{tid}/children") as f:
                found += [int(child) for child in f.read().split()]
    return found[1:]


def test_a_bomb_is_killed_at_the_limit_and_the_pool_goes_on():
    with RewardPool(workers=1) as pool:
        pool.score(*MIXED[3])
        started = time.monotonic()
        assert pool.score(*bomb(1)).status == "timeout"
        assert time.monotonic() - started < (
            2.5 if pool.stats()["processes"]["starved"] == 0 else 5
        )
        assert [r.correct for r in pool.score_batch(MIXED)] == MIXED_CORRECT
        assert pool.stats()["processes"]["kills"] == 1


def test_honest_answers_do_not_wait_for_bombs():
    with RewardPool(workers=1, time_limit=60.0) as pool:
        pool.score(*MIXED[3])
        bombs = threading.Thread(target=pool.score_batch, args=([bomb(n) for n in range(2)],))
        bombs.start()
        time.sleep(0.1)
        assert pool.score(r"\boxed{\arctan 3}", r"\arctan 3 + 0", "math").correct
        assert bombs.is_alive()
    bombs.join()


@pytest.mark.slow
def test_64_bombs_among_640_honest_answers():
    items, expected = [], []
    for n in range(1, 641):
        item, right = honest(n)
        items.append(item)
        expected.append(right)
        if n % 10 == 5:
            items.append(bomb(n))
            expected.append(False)
    started = time.monotonic()
    with RewardPool(workers=2) as pool:
        results = pool.score_batch(items)
        kills = pool.stats()["processes"]["kills"]
    assert [r.correct for r in results] == expected
    assert kills == 64
    assert time.monotonic() - started < 90


def test_a_batch_deadline_ends_the_batch_and_keeps_the_order():
    with RewardPool(workers=1, time_limit=5.0) as pool:
        pool.score(*MIXED[3])
        items = [MIXED[0], *[bomb(n) for n in range(6)], MIXED[2]]
        started = time.monotonic()
        results = pool.score_batch(items, deadline=0.5)
        assert time.monotonic() - started < 1.5
    assert [r.status for r in results] == ["correct", *["timeout"] * 6, "correct"]


def test_a_worker_that_dies_costs_one_answer():
    others = workers_of(os.getpid())
    with RewardPool(workers=1, time_limit=PATIENT) as pool:
        assert pool.score(*MIXED[3]).correct
        before = [pid for pid in workers_of(os.getpid()) if pid not in others]
        check = threading.Thread(target=pool.score, args=bomb(7))
        check.start()
        time.sleep(0.3)
        nursery, *workers = [pid for pid in workers_of(os.getpid()) if pid not in others]
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        check.join()
        assert pool.score(r"\boxed{\arctan 5}", r"\arctan 5 + 0", "math").correct
        os.kill(nursery, signal.SIGKILL)
        time.sleep(0.1)
        results = pool.score_batch([(rf"\boxed{{\arctan {n}}}", "x", "math") for n in range(3)])
        assert {r.status for r in results} <= {"wrong", "error"}
        assert pool.score(r"\boxed{\arctan 6}", r"\arctan 6 + 0", "math").correct
        assert pool.stats()["processes"]["crashes"] >= 1
    assert gone(before)


def test_a_worker_is_recycled_after_its_share_of_checks():
    with RewardPool(workers=1, time_limit=PATIENT, recycle_after=2) as pool:
        for n in range(1, 6):
            assert pool.score(rf"\boxed{{\arctan {n}}}", rf"\arctan {n} + 0", "math").correct
        assert pool.stats()["processes"]["recycled"] == 2


def test_a_closed_pool_answers_with_an_error_and_leaves_no_process():
    others = workers_of(os.getpid())
    pool = RewardPool(workers=2, time_limit=PATIENT)
    assert pool.score(*MIXED[3]).correct
    processes = [pid for pid in workers_of(os.getpid()) if pid not in others]
    pool.close()
    pool.close()
    assert pool.score(r"\boxed{\arctan 9}", r"\frac{\pi}{9}", "math").status == "error"
    assert pool.score(*MIXED[0]).correct
    assert gone(processes)


def test_no_process_outlives_a_parent_killed_with_9():
    code = (
        "import os, sys, threading, time; from sse_rewards import RewardPool\n"
        "pool = RewardPool(2, time_limit=60)\n"
        "pool.score(r'\\boxed{\\arctan 1}', '2', 'math')\n"
        f"threading.Thread(target=pool.score, args={bomb(1)!r}).start()\n"
        "time.sleep(0.2); print('ready', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    processes = workers_of(parent.pid)
    assert len(processes) >= 2
    parent.kill()
    parent.wait()
    assert gone(processes)


def test_the_parent_stays_small():
    code = (
        "from sse_rewards import RewardPool\n"
        "pool = RewardPool(2)\n"
        "text = 'word ' * 24000 + r'\\boxed{\\arctan 1}'\n"
        "pool.score_batch([(text, str(n), 'math') for n in range(300)])\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )  # getrusage would count the process that forked this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 150e6


def test_workers_have_no_environment_and_write_no_files(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with RewardPool(workers=1, time_limit=PATIENT) as pool:
        assert pool.score(*MIXED[3]).correct
        for pid in workers_of(os.getpid()):
            with open(f"/proc/{pid}/environ") as f:
                assert "SECRET_TOKEN" not in f.read()


def test_many_threads_and_an_event_loop_share_a_pool():
    with RewardPool(workers=2, time_limit=PATIENT) as pool:
        with ThreadPoolExecutor(8) as threads:
            batches = list(threads.map(lambda _: pool.score_batch(MIXED), range(16)))

        async def from_a_loop() -> list:
            inside = pool.score_batch(MIXED)
            beside = await asyncio.gather(
                *(asyncio.to_thread(pool.score_batch, MIXED) for _ in range(4))
            )
            return [inside, *beside]

        batches += asyncio.run(from_a_loop())
    assert all([r.correct for r in batch] == MIXED_CORRECT for batch in batches)


def test_a_forked_process_has_workers_of_its_own():
    with RewardPool(workers=1, time_limit=PATIENT) as pool:
        assert pool.score(*MIXED[3]).correct
        child = os.fork()
        if child == 0:
            right = pool.score(r"\boxed{\arctan 4}", r"\arctan 4 + 0", "math").correct
            pool.close()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.score(r"\boxed{\arctan 8}", r"\arctan 8 + 0", "math").correct


@pytest.mark.slow
def test_ray_tasks_and_actors_of_every_kind_give_the_same_results():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:

        def grade() -> list[bool]:
            from sse_rewards import score_batch

            return [r.correct for r in score_batch(MIXED)]

        class Sync:
            def grade(self) -> list[bool]:
                return grade()

        class Async:
            async def grade(self) -> list[bool]:
                return grade()

        found = [ray.get(ray.remote(grade).remote(), timeout=60)]
        for kind, options in ((Sync, {}), (Sync, {"max_concurrency": 3}), (Async, {})):
            actor = ray.remote(kind).options(**options).remote()
            found += ray.get([actor.grade.remote() for _ in range(3)], timeout=60)
            ray.kill(actor)
        assert all(verdicts == MIXED_CORRECT for verdicts in found)
    finally:
        ray.shutdown()
