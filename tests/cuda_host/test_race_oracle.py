"""The race check against an oracle that keeps every access and the set of all accesses ordered before it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.cuda_host import build

THREADS = 64
ACTIVE = [0, 1, 5, 31, 32, 40]  # of two warps; few, so that they meet
PROGRAMS = 1000
READ, WRITE, ADD, BARRIER, SYNC_WARP, FENCE, TICKET = range(1, 8)
Row = dict[int, tuple[int, int]]  # by thread, what it does and the argument: an address, a mask, a counter


def accesses(random_: random.Random, kinds: list[int], addresses: list[int]) -> Row:
    threads = random_.sample(ACTIVE, random_.randint(1, 2))
    return {thread: (random_.choice(kinds), random_.choice(addresses)) for thread in threads}


def warps_synced(random_: random.Random) -> Row:
    """One or both warps, all lanes or some."""
    row: Row = {}
    for warp in random_.choice([[0], [1], [0, 1]]):
        lanes = random_.choice([range(32), random_.sample([0, 1, 5, 8, 31], random_.randint(1, 4))])
        mask = sum(1 << lane for lane in lanes)
        signed = mask - 2**32 if mask >= 2**31 else mask
        row |= {32 * warp + lane: (SYNC_WARP, signed) for lane in lanes}
    return row


def every(what: int, argument: int = 0) -> Row:
    return dict.fromkeys(range(THREADS), (what, argument))


def block_program(random_: random.Random) -> list[Row]:
    rows = []
    kinds = random_.choice([[READ, WRITE, ADD], [READ, READ, READ, WRITE], [ADD, ADD, ADD, READ]])
    addresses = random_.choice([[0], [0, 1]])
    for _ in range(random_.randint(4, 14)):
        choice = random_.random()
        if choice < 0.4:
            rows.append(accesses(random_, kinds, addresses))
        else:
            rows.append(every(BARRIER) if choice < 0.55 else warps_synced(random_))
    return rows


def grid_program(random_: random.Random, blocks: int, fences: list[list[int]], counters: int) -> list[list[Row]]:
    """Access by each block to a place of its own, "last block done", access by the last one to any of these places.

    Some of the steps are left out or doubled.
    """

    def sync() -> Row:
        return every(BARRIER) if random_.random() < 0.9 else warps_synced(random_)

    def fence() -> Row:
        return dict.fromkeys(random_.choice(fences), (FENCE, 0))

    def ticket() -> Row:
        return {random_.choice(ACTIVE[::2]): (TICKET, random_.randrange(counters))}

    def some(steps: list[Callable[[], Row]]) -> list[Row]:
        return [step() for step in steps for _ in range(random_.choice([0, *[1] * 14, 2]))]

    def block(places: list[int], *then: Callable[[], Row]) -> list[Row]:
        first = accesses(random_, [READ, WRITE], places)
        useless = [fence()] if random_.random() < 0.3 else []
        return [*useless, first, *some([sync, fence, sync, ticket, *then])]

    last = block([blocks - 1], sync, fence, sync)
    return [*(block([b]) for b in range(blocks - 1)), [*last, accesses(random_, [READ, WRITE], list(range(blocks)))]]


@dataclass
class Event:
    block: int
    thread: int
    what: int
    argument: int
    before: int  # a bit per event of the block


def events_of(block: int, rows: list[Row], first: int) -> Iterator[Event]:
    before = [0] * THREADS  # what is ordered before each thread's next step
    count = first
    for row in rows:
        groups: dict[tuple[int, int], list[int]] = {}
        for thread, (what, argument) in row.items():
            if what == BARRIER:
                groups.setdefault((0, 0), []).append(thread)
            elif what == SYNC_WARP:
                groups.setdefault((1, thread // 32), []).append(thread)
            else:
                yield Event(block, thread, what, argument, before[thread])
                before[thread] |= 1 << count
                count += 1
        for threads in groups.values():
            union = 0
            for thread in threads:
                union |= before[thread]
            for thread in threads:
                before[thread] = union


def has_race(blocks: list[list[Row]]) -> bool:
    events: list[Event] = []
    for block, rows in enumerate(blocks):
        events += events_of(block, rows, len(events))

    def fenced(first: int, last: int, ticket: int) -> bool:  # by the ticket's thread, and ordered between the two
        return any(
            event.what == FENCE
            and event.thread == events[ticket].thread
            and event.before >> first & 1
            and events[last].before >> i & 1
            for i, event in enumerate(events)
        )

    def ordered(first: int, last: int) -> bool:
        a, b = events[first], events[last]
        if a.block == b.block:
            return bool(b.before >> first & 1)
        tickets = [i for i, event in enumerate(events) if event.what == TICKET]
        return any(
            events[r].block == a.block
            and events[q].block == b.block
            and events[r].argument == events[q].argument
            and fenced(first, r, r)
            and fenced(q, last, q)
            for r in tickets
            for q in tickets
        )

    for last, b in enumerate(events):
        for first, a in enumerate(events[:last]):
            kinds = {a.what, b.what}
            if not kinds <= {READ, WRITE, ADD} or a.argument != b.argument or kinds in ({READ}, {ADD}):
                continue
            if (a.block, a.thread) != (b.block, b.thread) and not ordered(first, last):
                return True
    return False


def reports_race(kernels: build.Kernels, blocks: list[list[Row]]) -> bool:
    steps = max(map(len, blocks))
    program = torch.zeros(len(blocks), steps, THREADS, 2, dtype=torch.int32)
    for block, rows in enumerate(blocks):
        for step, row in enumerate(rows):
            for thread, (what, argument) in row.items():
                program[block, step, thread, 0], program[block, step, thread, 1] = what, argument
    data, tickets = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    sums = torch.zeros(len(blocks), THREADS, dtype=torch.int32)
    try:
        kernels.call("program_int32", program, len(blocks), steps, data, tickets, sums)
    except build.KernelError as error:
        if " races\ndata race on" in str(error):
            return True
        raise
    return False


@pytest.fixture(scope="module")
def kernels() -> build.Kernels:
    reason = build.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return build.load("race_oracle.cpp", "race")


@pytest.mark.parametrize("seed", range(2))
def test_within_a_block(kernels: build.Kernels, seed: int) -> None:
    random_ = random.Random(seed)
    kernels.seed(seed)
    verdicts = []
    for _ in range(PROGRAMS):
        blocks = [block_program(random_)]
        verdicts.append(has_race(blocks))
        assert reports_race(kernels, blocks) == verdicts[-1], blocks
    assert 0.2 < sum(verdicts) / PROGRAMS < 0.8  # both kinds of programs


@pytest.mark.parametrize("seed", range(2))
def test_between_blocks(kernels: build.Kernels, seed: int) -> None:
    random_ = random.Random(seed)
    kernels.seed(0)  # the oracle's order
    verdicts = []
    for _ in range(PROGRAMS):
        blocks = grid_program(random_, random_.choice([2, 3]), [ACTIVE], counters=1)
        verdicts.append(has_race(blocks))
        assert reports_race(kernels, blocks) == verdicts[-1], blocks
    assert 0.2 < sum(verdicts) / PROGRAMS < 0.8


@pytest.mark.parametrize("seed", range(2))
def test_fences_of_some_threads_and_two_counters_raise_no_false_alarm(kernels: build.Kernels, seed: int) -> None:
    random_ = random.Random(seed)
    kernels.seed(0)
    verdicts, reports = 0, 0
    for _ in range(PROGRAMS):
        blocks = grid_program(random_, 2, [[0, 31], [0, 1, 5, 40], ACTIVE, ACTIVE], random_.choice([1, 2]))
        verdict, report = has_race(blocks), reports_race(kernels, blocks)
        assert verdict or not report, blocks
        verdicts, reports = verdicts + verdict, reports + report
    assert 0.2 < verdicts / PROGRAMS < 0.8
    assert reports > 0.9 * verdicts  # of the blocks before, one reader is kept
