"""A budget that works share in turns, and the queues behind it."""

import asyncio
import random

from ray_synth.service.turns import Room, Turns


def test_what_is_inside_never_exceeds_the_budget_and_one_too_large_goes_alone():
    inside, most, order = [], 0, []

    async def work(room, caller, cost):
        nonlocal most
        async with room.entered(caller, cost):
            inside.append(cost)
            most = max(most, sum(inside) if len(inside) > 1 else 0)
            assert len(inside) <= 3
            await asyncio.sleep(0.001)
            inside.remove(cost)
            order.append((caller, cost))

    async def run():
        rng = random.Random(0)
        room = Room(100, at_once=3)
        works = [work(room, ("a", i % 5), rng.choice([1, 30, 60, 500])) for i in range(60)]
        await asyncio.gather(*works)
        assert (room.inside, room.count) == (0, 0)

    asyncio.run(run())
    assert 60 < most <= 100
    assert len(order) == 60


def test_who_goes_away_gives_the_place_back():
    async def run():
        room = Room(10, at_once=1)
        done = []

        async def work(name):
            async with room.entered((name, 0), 10):
                await asyncio.sleep(0.01)
                done.append(name)

        tasks = [asyncio.create_task(work(name)) for name in "abc"]
        await asyncio.sleep(0.001)
        tasks[1].cancel()  # waits
        tasks[0].cancel()  # is inside
        await asyncio.gather(*tasks, return_exceptions=True)
        assert done == ["c"]
        assert (room.inside, room.count) == (0, 0)

    asyncio.run(run())


def test_callers_take_turns_by_what_their_works_cost():
    async def run():
        turns = Turns()
        loop = asyncio.get_running_loop()
        for i in range(6):
            turns.put(("big", 1), f"big{i}", loop.create_future(), 10)
        for i in range(6):
            turns.put(("small", 2), f"small{i}", loop.create_future(), 2)
        return [turns.pop().item for _ in range(12)]

    order = asyncio.run(run())
    assert order.index("small5") < order.index("big2")


def test_threads_are_as_many_as_the_cpus_that_a_container_has(tmp_path):
    import os

    from ray_synth.device import usable_cpus

    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert usable_cpus(tmp_path) == min(2, len(os.sched_getaffinity(0)))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cpus(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("100000")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert usable_cpus(tmp_path) == 1
