import numpy as np
import pytest

from sse_rl.rollout.pools import PagePool, SlotPool
from sse_rl.rollout.scheduler import Scheduler
from sse_rl.rollout.sequence import Job, Sequence
from sse_rl.types import Request, SamplingParams


def job(name: str, length: int, *, n: int = 1, limit: int = 10) -> Job:
    return Job(Request(name, (0,) * length, SamplingParams(n=n, max_tokens=limit)), limit)


def scheduler(**options: int | None) -> Scheduler:
    settings = {"max_num_seqs": 4, "num_pages": 9, "page_size": 16, "max_num_batched_tokens": 128}
    return Scheduler(**settings | options)


def test_a_shared_page_is_free_after_its_last_owner():
    pages = PagePool(4)
    mine = pages.take(2)
    theirs = pages.share(mine)
    pages.give(mine)
    assert pages.free == 1
    pages.give(theirs)
    assert pages.free == 3


def test_slot_and_page_zero_are_never_handed_out():
    slots, pages = SlotPool(3), PagePool(3)
    assert {slots.take(), slots.take()} == {1, 2}
    assert set(pages.take(2)) == {1, 2}


def test_prompts_are_cut_at_multiples_of_64_oldest_first():
    s = scheduler(num_pages=99)
    s.add(job("a", 100))
    s.add(job("b", 150))
    cuts = [[(p.job.request.request_id, p.start, p.stop) for p in s.schedule()] for _ in range(4)]
    assert cuts == [[("a", 0, 100)], [("b", 0, 128)], [("b", 128, 150)], []]


def test_samples_share_the_full_pages_of_their_prompt_and_the_last_takes_its_slot():
    s = scheduler()
    s.add(job("a", 40, n=3, limit=9))
    [piece] = s.schedule()
    first, second, last = s.start()
    assert first.pages[:2] == second.pages[:2] == last.pages[:2] == piece.job.pages[:2]
    assert len({first.pages[2], second.pages[2], last.pages[2]}) == 3
    assert last.inherits and last.slot == piece.job.slot and last.pages == piece.job.pages
    assert s.pages.free == 8 - 5


def test_more_samples_than_slots_run_in_waves():
    s = scheduler(max_num_seqs=2, num_pages=99)
    s.add(job("a", 20, n=5))
    s.schedule()
    running, order = s.start(), []
    while running:
        assert len(running) <= 2
        sequence = running.pop(0)
        order.append(sequence.index)
        s.finish(sequence)
        s.schedule()
        running += s.start()
    assert order == [0, 1, 2, 3, 4]
    assert not s.jobs and s.slots.free == 3 and s.pages.free == 98


def test_a_large_request_is_not_overtaken_by_small_ones():
    s = scheduler(max_num_seqs=4, num_pages=9)
    s.add(job("small", 16, limit=1))
    s.add(job("large", 120, limit=9))  # all eight pages
    s.add(job("later", 16, limit=1))
    s.schedule()
    [small] = s.start()
    assert small.job.request.request_id == "small"
    s.finish(small)
    s.schedule()
    [large] = s.start()
    assert large.job.request.request_id == "large"


def test_a_request_that_can_never_fit_names_its_pages():
    with pytest.raises(ValueError, match=r"'a' needs 10 KV pages of 16 tokens .* has 8"):
        scheduler().add(job("a", 140, limit=9))
    with pytest.raises(ValueError, match=r"'b' needs 9 KV pages"):
        scheduler().add(job("b", 120, n=2, limit=9))  # its kept prompt besides


def test_an_id_in_use_is_refused():
    s = scheduler()
    s.add(job("a", 4))
    with pytest.raises(ValueError, match="'a' is already"):
        s.add(job("a", 4))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("page_size", [16, None])
def test_everything_ends_in_order_and_everything_is_returned(seed: int, page_size: int | None):
    rng = np.random.default_rng(seed)
    s = scheduler(max_num_seqs=int(rng.integers(1, 5)), page_size=page_size)
    jobs, aborted = [], 0
    for i in range(20):
        jobs.append(job(str(i), int(rng.integers(1, 60)), n=int(rng.integers(1, 7)), limit=40))
        s.add(jobs[-1])
    running: list[Sequence] = []
    started: list[Sequence] = []
    while s.jobs:
        s.schedule()
        new = s.start()
        started += new
        running += new
        assert len(running) <= s.max_num_seqs
        assert len({sequence.slot for sequence in running}) == len(running)
        if rng.random() < 0.05:
            victim = s.jobs[str(rng.choice(list(s.jobs)))]
            aborted += 1
            running = [sequence for sequence in running if sequence.job is not victim]
            s.abort(victim)
        for sequence in running[:]:
            if rng.random() < 0.3:
                running.remove(sequence)
                s.finish(sequence)
    assert s.slots.free == s.max_num_seqs + 1 and s.pages.free == 8
    order = [(int(x.job.request.request_id), x.index) for x in started]
    assert len(order) == len(set(order))
    for name in {name for name, _ in order}:
        mine = [index for other, index in order if other == name]
        assert mine == list(range(len(mine)))


@pytest.mark.parametrize(
    "options",
    [{"page_size": None}, {"num_pages": 4 * 40 + 1}],
    ids=["slots run out", "pages run out"],
)
@pytest.mark.parametrize("n", [1, 4])
def test_prompts_wait_for_company_while_the_engine_stays_full(options: dict, n: int):
    rng = np.random.default_rng(0)
    s = scheduler(max_num_seqs=64, **{"num_pages": 999, "max_num_batched_tokens": 10**6} | options)
    for i in range(640 // n):
        s.add(job(str(i), 20, n=n, limit=40))
    running: list[Sequence] = []
    prefills, used = 0, []
    while s.jobs:
        prefills += bool(s.schedule())
        running += s.start()
        for sequence in running[:]:
            if rng.random() < 1 / 50:
                running.remove(sequence)
                s.finish(sequence)
        if s._waiting:
            used.append(len(running))
    assert prefills <= 4 * 640 / max(used) + 4
    assert np.mean(used[1:]) > 0.8 * max(used)


def test_the_longer_the_answers_the_fewer_places_stay_empty():
    """Where one in `life` ends a step, the fewest are lost if sqrt(2 * 4 * life) steps pass."""
    for life in (60, 500, 4000):
        rng = np.random.default_rng(life)
        s = scheduler(max_num_seqs=500, page_size=None, max_num_batched_tokens=10**6)
        running, waits = [], []
        for i in range(2000):
            s.add(job(str(i), 1))
        step = last = 0
        while len(waits) < 6:
            step += 1
            if s.schedule():
                waits.append(step - last)
                last = step
            running += s.start()
            for at in np.flatnonzero(rng.random(len(running)) < 1 / life)[::-1]:
                s.finish(running.pop(at))
        optimum = min((8 * life) ** 0.5, 0.29 * life)  # a quarter has ended after ln(4/3) lives
        assert 0.75 * optimum < np.mean(waits[1:]) < 1.25 * optimum + 2


def test_what_fits_into_free_slots_is_placed_at_once():
    s = scheduler(max_num_seqs=8, num_pages=99)
    s.add(job("a", 10))
    assert len(s.schedule()) == 1
    s.add(job("b", 10))
    assert len(s.schedule()) == 1


def test_an_abort_of_what_runs_lets_the_others_in():
    s = scheduler(max_num_seqs=8, num_pages=99)
    for name in "abcdefghij":
        s.add(job(name, 10))
    assert len(s.schedule()) == 8
    s.start()
    assert not s.schedule()
    s.abort(s.jobs["c"])
    s.abort(s.jobs["d"])
    assert [piece.job.request.request_id for piece in s.schedule()] == ["i", "j"]


@pytest.mark.parametrize("samples", [1, 8])
def test_the_longest_prompt_shared_by_samples_fits_a_worker_of_one_slot(samples):
    longest, page = 120, 16
    pages = -(-longest // page) + 2  # as a worker has them by default
    s = scheduler(max_num_seqs=1, num_pages=pages, page_size=page)
    s.add(job("a", 100, n=samples, limit=20))
    assert s.schedule()
    if samples > 1:
        with pytest.raises(ValueError, match="KV pages"):
            scheduler(max_num_seqs=1, num_pages=pages - 1).add(job("a", 100, n=8, limit=20))
