"""Batches form while the model is busy, of like requests, in the order of asking."""

import asyncio

import pytest

from ray_synth.service.full_batches import FullBatches


def run(requests, **options):
    """Answers, and the batches that the model saw; it takes 20 ms per batch."""
    seen = []

    async def work(batch):
        seen.append(list(batch))
        await asyncio.sleep(0.02)
        return [f"answer {request}" for request in batch]

    async def ask_all():
        batches = FullBatches(work, wait_s=0.001, **options)
        first = asyncio.create_task(batches(requests[0]))
        await asyncio.sleep(0.01)  # the model is busy with the first when the others come
        rest = []
        for request in requests[1:]:
            rest.append(asyncio.create_task(batches(request)))
            await asyncio.sleep(0.0005)
        return await asyncio.gather(first, *rest), batches

    answers, batches = asyncio.run(ask_all())
    return answers, seen, batches


def test_what_comes_while_the_model_is_busy_is_one_batch():
    answers, seen, batches = run(list(range(11)), max_size=4)
    assert answers == [f"answer {i}" for i in range(11)]
    assert seen == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert (batches.batches, batches.items) == (4, 11)


def test_only_like_requests_share_a_batch_and_the_oldest_goes_first():
    _, seen, _ = run([(0, "a"), (1, "b"), (2, "a"), (3, "b")], max_size=4, kind=lambda r: r[1])
    assert seen == [[(0, "a")], [(1, "b"), (3, "b")], [(2, "a")]]


def test_sizes_count_and_a_request_too_large_goes_alone():
    _, seen, _ = run(["x", "abc", "de", "abcdefgh", "f"], max_size=5, size=len)
    assert all(sum(map(len, batch)) <= 5 or len(batch) == 1 for batch in seen)


def test_an_error_reaches_its_batch_alone_and_the_next_is_answered():
    async def work(batch):
        if "bad" in batch:
            raise ValueError("a bad one")
        return batch

    async def ask():
        batches = FullBatches(work, max_size=2, wait_s=0.001)
        return await asyncio.gather(
            *(batches(r) for r in ("good", "bad", "fine")), return_exceptions=True
        )

    first, second, third = asyncio.run(ask())
    assert isinstance(first, ValueError) and isinstance(second, ValueError)
    assert third == "fine"


def test_a_caller_who_went_away_is_not_worked_for():
    seen = []

    async def work(batch):
        seen.extend(batch)
        await asyncio.sleep(0.02)
        return batch

    async def ask():
        batches = FullBatches(work, max_size=1, wait_s=0.001)
        tasks = [asyncio.create_task(batches(i)) for i in range(3)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(asyncio.CancelledError):
            raise done[1]
        return done[0], done[2]

    assert asyncio.run(ask()) == (0, 2)
    assert seen == [0, 2]


def test_a_caller_with_much_to_ask_keeps_no_other_waiting():
    """Neither another address, nor another request of the same gateway."""
    seen = []

    async def work(batch):
        seen.append(batch)
        await asyncio.sleep(0.001)
        return batch

    async def ask():
        batches = FullBatches(work, max_size=4, wait_s=0.001)
        much = [asyncio.create_task(batches(f"a{i}", ("gateway", 1))) for i in range(100)]
        await asyncio.sleep(0.005)
        little = [asyncio.create_task(batches(f"b{i}", ("gateway", 2))) for i in range(4)]
        other = [asyncio.create_task(batches(f"c{i}", ("elsewhere", 3))) for i in range(4)]
        await asyncio.gather(*little, *other)
        before = sum(map(len, seen))
        await asyncio.gather(*much)
        return before

    before = asyncio.run(ask())
    assert before < 60, "the others were answered long before the hundred"
    assert sum(map(len, seen)) == 108
