"""Checkpoints: saved by any number of ranks, loaded by any other, whole or not there."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.distributed import cases
from tests.distributed.cases import DIM, cut, part
from tests.distributed.pool import Pool
from tests.distributed.test_rings import mixed

STATEFUL = {"capacity": 60, "margin": "ada", "mining": "curricular", "quality": "recognizability", "scale": 8.0}
OPTIONS: dict[str, Any] = {**STATEFUL, "dtype": torch.float64, "average_gradients": False}
State = dict[str, Tensor]


def run(pool: Pool, ranks: int, function: Any, *args: Any) -> list[Any]:
    """Run a task on some ranks of the pool, or in this process."""
    return [function(None, *args)] if ranks == 1 else pool.run(ranks, function, *args)


def held(module: torch.nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def memory_of(state: State) -> State:
    return {name.removeprefix("memory."): value for name, value in state.items() if name.startswith("memory.")}


def same(ours: State, wanted: State) -> bool:
    return ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def steps(loss_fn: pmk.PrototypeMemoryLoss, data: Any) -> Tensor:
    """Run steps, this rank's part of each; return the last loss."""
    loss = torch.tensor(0.0)
    for e, labels, _ in data:
        sizes = cut(len(e), loss_fn.ranks.size, "ragged")
        loss = loss_fn(part(e, sizes, loss_fn.ranks.rank), part(labels, sizes, loss_fn.ranks.rank))
    return loss.detach()


def trained(group: Any, options: dict[str, Any], data: Any, path: Path) -> State:
    loss_fn = cases.head(options, group)
    steps(loss_fn, data)
    pmk.distributed.save(path, loss_fn)
    return held(loss_fn)


def resumed(group: Any, options: dict[str, Any], data: Any, path: Path) -> tuple[State, Tensor, list[str]]:
    loss_fn, said = cases.head(options, group), Said()
    logging.getLogger("protomem_kernels").addHandler(said)
    try:
        pmk.distributed.load(path, loss_fn)
    finally:
        logging.getLogger("protomem_kernels").removeHandler(said)
    return held(loss_fn), steps(loss_fn, data), said.lines


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("policy", ["fifo", "lru"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (1, 2), (3, 2)])
def test_training_goes_on_with_another_number_of_ranks(
    pool: Pool, before: int, after: int, policy: str, tmp_path: Path
) -> None:
    """Below 90 % fill the next losses are those of one process that never stopped, and so are the statistics."""
    options = {**OPTIONS, "policy": policy}
    data = cases.batches(6, 24)
    run(pool, before, trained, options, data[:4], tmp_path)
    undisturbed = cases.head(options)
    steps(undisturbed, data[:4])
    assert 20 < len(undisturbed.memory) < 0.9 * 60
    wanted, loss = held(undisturbed), steps(undisturbed, data[4:])
    ours = run(pool, after, resumed, options, data[4:], tmp_path)
    for state, ours_loss, said in ours:
        assert abs(float(ours_loss - loss)) < 1e-10
        assert said == []
        for name in wanted.keys() - {f"memory.{name}" for name in memory_of(wanted)}:
            torch.testing.assert_close(state[name], wanted[name], rtol=0, atol=1e-12)
    rows = [row for state, _, _ in ours for row in by_identity(memory_of(state))]
    for (identity, stamp, row), (identity1, stamp1, row1) in zip(
        sorted(rows, key=lambda one: one[0]), by_identity(memory_of(wanted)), strict=True
    ):
        assert (identity, stamp) == (identity1, stamp1)
        torch.testing.assert_close(row, row1, rtol=0, atol=1e-12)


def by_identity(memory: State) -> list[tuple[int, int, Tensor]]:
    """Return (identity, stamp, row), by identity."""
    there = zip(memory["identities"].tolist(), memory["stamps"].tolist(), memory["prototypes"], strict=True)
    return sorted((one for one in there if one[0] >= 0), key=lambda one: one[0])


@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_as_many_ranks_resume_bit_for_bit(pool: Pool, policy: str, tmp_path: Path) -> None:
    """A full memory too: every slot, cursor and stamp, and the next loss."""
    options = {**OPTIONS, "policy": policy, "capacity": 23}
    data = cases.batches(9, 24, identities=45)
    saved = pool.run(3, trained, options, data[:7], tmp_path)
    assert any(bool((memory_of(state)["identities"] >= 0).all()) for state in saved)
    first = pool.run(3, resumed, options, data[7:], tmp_path)
    assert all(same(ours[0], state) for ours, state in zip(first, saved, strict=True))
    assert all(
        torch.equal(ours[1], loss) for ours, loss in zip(first, pool.run(3, all_the_way, options, data), strict=True)
    )


def all_the_way(group: Any, options: dict[str, Any], data: Any) -> Tensor:
    return steps(cases.head(options, group), data)


@pytest.mark.parametrize("policy", ["fifo", "lru"])
@pytest.mark.parametrize(("before", "after", "capacity"), [(3, 2, 17), (2, 3, 14), (3, 1, 11), (1, 3, 17)])
def test_overflow_is_that_of_a_model(
    pool: Pool, before: int, after: int, capacity: int, policy: str, tmp_path: Path
) -> None:
    """What is dropped, and in which slot the others lie, in plain Python."""
    options = {**OPTIONS, "policy": policy, "capacity": 23}
    saved = run(pool, before, trained, options, cases.batches(7, 24, identities=45), tmp_path)
    ours = run(pool, after, resumed, {**options, "capacity": capacity}, [], tmp_path)

    queue = []  # in the order in which rows would be overwritten
    for rank, state in enumerate(saved):
        memory = memory_of(state)
        size, cursor = len(memory["identities"]), int(memory["cursor"])
        for slot, identity in enumerate(memory["identities"].tolist()):
            behind = cursor - slot if slot < cursor else cursor - slot + size
            stamp = int(memory["stamps"][slot])
            age: tuple[float, ...] = (-behind / size, rank) if policy == "fifo" else (stamp, rank, slot)
            if identity >= 0:
                queue.append((age, identity, stamp, memory["prototypes"][slot]))
    queue.sort(key=lambda one: one[0])
    slots, dropped = -(-capacity // after), 0
    for rank, (state, _, said) in enumerate(ours):
        mine = [one for one in queue if mixed(one[1]) % after == rank]
        dropped += max(len(mine) - slots, 0)
        mine, memory = mine[-slots:], memory_of(state)
        empty = slots - len(mine)
        assert memory["identities"].tolist() == [one[1] for one in mine] + [-1] * empty
        assert memory["stamps"].tolist() == [one[2] for one in mine] + [0] * empty
        assert torch.equal(
            memory["prototypes"], torch.stack([one[3] for one in mine] + [torch.zeros(DIM).double()] * empty)
        )
        assert int(memory["cursor"]) == len(mine) % slots
        assert int(memory["clock"]) == int(memory_of(saved[0])["clock"])
        assert rank == 0 or said == []
    assert dropped > 0
    assert ours[0][2] == [
        f"{dropped} of {len(queue)} identities were dropped, the oldest of those that "
        f"{after} x {slots} slots have no place for"
    ]


def class_weights(group: Any, path: Path, saves: bool) -> Tensor:
    loss_fn = pmk.MarginSoftmaxLoss(10, DIM, process_group=group)
    (pmk.distributed.save if saves else pmk.distributed.load)(path, loss_fn)
    return loss_fn.weight.detach().clone()


def test_class_weights_go_by_rows(pool: Pool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = torch.cat(pool.run(3, class_weights, tmp_path, True))
    assert len(whole) == 10
    assert whole.unique().numel() > 70
    for ranks in (2, 1, 3):
        assert torch.equal(torch.cat(run(pool, ranks, class_weights, tmp_path, False)), whole)


def test_a_state_dict_of_one_process_goes_to_ranks_and_back(pool: Pool, tmp_path: Path) -> None:
    """By way of a head of one process."""
    data = cases.batches(5, 24)
    plain = cases.head(OPTIONS)
    steps(plain, data[:4])
    state = held(plain)
    through = cases.head(OPTIONS)
    through.load_state_dict(state)
    pmk.distributed.save(tmp_path, through)
    ours = pool.run(3, trained_on, OPTIONS, data[4:], tmp_path)
    back = cases.head(OPTIONS)
    pmk.distributed.load(tmp_path, back)
    steps(plain, data[4:])
    assert sum(len(by_identity(memory_of(held_on))) for held_on in ours) == len(plain.memory)
    for ours_one, plain_one in zip(
        by_identity(memory_of(held(back))), by_identity(memory_of(held(plain))), strict=True
    ):
        assert ours_one[:2] == plain_one[:2]
        torch.testing.assert_close(ours_one[2], plain_one[2], rtol=0, atol=1e-12)


def trained_on(group: Any, options: dict[str, Any], data: Any, path: Path) -> State:
    """Load, train and save into the same folder."""
    loss_fn = cases.head(options, group)
    pmk.distributed.load(path, loss_fn)
    steps(loss_fn, data)
    pmk.distributed.save(path, loss_fn)
    return held(loss_fn)


def in_the_background(group: Any, path: Path, data: Any) -> tuple[list[State], list[State]]:
    """Save twice while training goes on; return the states at the calls, and what is loaded."""
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(DIM, DIM), "head": cases.head(OPTIONS, group)})
    for value in model["encoder"].parameters():  # alike on all ranks, as training keeps it
        torch.nn.init.constant_(value, 0.5)
    states, futures = [], []
    for place in range(2):
        steps(model["head"], data[2 * place : 2 * place + 2])
        states.append(held(model))
        futures.append(pmk.distributed.save_async(path / str(place), model))
        for value in model["encoder"].parameters():
            value.data += 1.0
    steps(model["head"], data)
    for future in futures:
        assert future.result(60) is None
    loaded = []
    for place in range(2):
        pmk.distributed.load(path / str(place), model)
        loaded.append(held(model))
    return states, loaded


def test_training_goes_on_while_a_save_is_written(pool: Pool, tmp_path: Path) -> None:
    for states, loaded in pool.run(pool.size, in_the_background, tmp_path, cases.batches(4, 24)):
        assert all(same(ours, state) for ours, state in zip(loaded, states, strict=True))


def test_the_manifest_says_what_there_is(pool: Pool, tmp_path: Path) -> None:
    saved = pool.run(2, trained, OPTIONS, cases.batches(1, 24), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    checkpoint = manifest["checkpoint"]
    assert (checkpoint["format"], checkpoint["version"]) == ("protomem-rows", 1)
    assert checkpoint["torch"] == torch.__version__
    assert checkpoint["tensors"].keys() == saved[0].keys()
    assert checkpoint["tensors"]["memory.prototypes"]["shape"] == [60, DIM]
    assert checkpoint["tensors"]["margin.mean"]["shape"] == []
    files = {piece["file"] for tensor in checkpoint["tensors"].values() for piece in tensor["pieces"]}
    assert {path.name for path in tmp_path.iterdir()} == files | {"manifest.json"}
    assert len(files) == 2
    # Raw bytes: nothing but the tensors, what is alike on all ranks once.
    sizes = [value.numel() * value.element_size() for value in saved[0].values()]
    memory = [value.numel() * value.element_size() for value in memory_of(saved[1]).values()]
    assert sum((tmp_path / file).stat().st_size for file in files) == sum(sizes) + sum(memory)


# What is refused


def refused(group: Any, options: dict[str, Any], path: Path, everywhere: bool = True) -> tuple[str, str, bool]:
    """Load; return the error and whether nothing was changed."""
    loss_fn = cases.head(options, group)
    steps(loss_fn, cases.batches(1, 12, seed=5, dtype=loss_fn.memory.prototypes.dtype))
    before = held(loss_fn)
    if not everywhere and loss_fn.ranks.rank == 1:
        path = path / "elsewhere"
    try:
        pmk.distributed.load(path, loss_fn)
    except Exception as error:
        return type(error).__name__, str(error), same(held(loss_fn), before)
    return "nothing", "", False


def cut_off(folder: Path) -> None:
    path = sorted(folder.glob("*-1.rows"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def foreign(folder: Path) -> None:
    path = sorted(folder.glob("*-1.rows"))[0]
    path.write_bytes(bytes(len(path.read_bytes())))


def one_bit(folder: Path) -> None:
    path = sorted(folder.glob("*-0.rows"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def without(pattern: str) -> Any:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def rewritten(before: str, after: str) -> Any:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))

    return change


DAMAGES: dict[str, tuple[Any, str]] = {
    "cut off": (cut_off, "-1.rows was cut off: "),
    "foreign": (foreign, "-1.rows is not what was saved here: the checksum of memory."),
    "one bit": (one_bit, "-0.rows is not what was saved here: the checksum of "),
    "no file": (without("*-1.rows"), "-1.rows cannot be read: No such file"),
    "no manifest": (without("manifest.json"), "holds no checkpoint: there is no manifest.json"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "another's manifest": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        "is no manifest of a checkpoint",
    ),
    "a changed manifest": (rewritten('"first": 30', '"first": 31'), "its checksum is not that of its content"),
    "a later version": (
        rewritten('"version": 1', '"version": 9'),
        "must be of format protomem-rows 1, got protomem-rows 9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_on_every_rank(pool: Pool, damage: str, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    pool.run(2, trained, OPTIONS, cases.batches(2, 24), tmp_path)
    change(tmp_path)
    for ranks in (1, 3):
        answers = run(pool, ranks, refused, OPTIONS, tmp_path)
        assert all(answer == answers[0] for answer in answers)
        kind, message, unchanged = answers[0]
        assert kind == "RuntimeError"
        assert words in message
        assert unchanged


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dtype": torch.float32}, "memory.prototypes must be torch.float32 in "),
        ({"mining": "none"}, "not in module are mining.t"),
        ({"mining": "none", "margin": "elastic"}, "not saved were margin.generator_state"),
    ],
)
def test_another_head_is_refused(pool: Pool, other: dict[str, Any], words: str, tmp_path: Path) -> None:
    pool.run(2, trained, OPTIONS, cases.batches(2, 24), tmp_path)
    answers = pool.run(3, refused, {**OPTIONS, **other}, tmp_path)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == "ValueError"
    assert words in answers[0][1]
    assert answers[0][2]


def test_another_shape_is_refused(tmp_path: Path) -> None:
    pmk.distributed.save(tmp_path / "memory", pmk.PrototypeMemory(6, 4))
    with pytest.raises(ValueError, match="prototypes must have embedding_dim 5, got 4"):
        pmk.distributed.load(tmp_path / "memory", pmk.PrototypeMemory(6, 5))
    pmk.distributed.save(tmp_path / "classes", pmk.MarginSoftmaxLoss(6, 4))
    with pytest.raises(ValueError, match=r"weight must have shape \(7, 4\) over all ranks, got \(6, 4\)"):
        pmk.distributed.load(tmp_path / "classes", pmk.MarginSoftmaxLoss(7, 4))
    pmk.distributed.save(tmp_path / "encoder", torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 1\), got \(3, 2\)"):
        pmk.distributed.load(tmp_path / "encoder", torch.nn.Linear(1, 3))


def test_ranks_must_mean_the_same_checkpoint(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, trained, OPTIONS, cases.batches(2, 24), tmp_path)
    pool.run(2, trained, OPTIONS, cases.batches(1, 24), tmp_path / "elsewhere")
    first, second = pool.run(2, refused, OPTIONS, tmp_path, False)
    assert first == second
    assert first[0] == "ValueError"
    assert "the checkpoint must be the same on all ranks" in first[1]
    assert first[2]


class WithMore(pmk.MarginSoftmaxLoss):
    def get_extra_state(self) -> int:
        return 7


def groups_mixed(group: Any, path: Path) -> list[str]:
    """Save what cannot be: heads of two kinds, tensors that differ between ranks, some ranks in the background."""
    shared, own = pmk.MarginSoftmaxLoss(6, 2, process_group=group), pmk.MarginSoftmaxLoss(6, 2)
    rank = shared.ranks.rank
    found = []
    for call in (
        lambda: pmk.distributed.save(path, torch.nn.ModuleList([shared, own])),
        lambda: pmk.distributed.save(path, torch.nn.ModuleList([shared, torch.nn.Linear(2, 3 + rank)])),
        lambda: pmk.distributed.save(path / str(rank), shared),
        lambda: pmk.distributed.save_async(path, shared),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_ranks_cannot_save_together_is_told(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(2, groups_mixed, tmp_path)
    assert first == second
    assert first == [
        "module must hold heads of one process_group, got 2 (None is one)",
        "1.weight must be the same on all ranks, got (3, 2) of torch.float32 on rank 0 and (4, 2) of torch.float32 on "
        "rank 1",
        f"path must be the same on all ranks, got {tmp_path}/0 on rank 0 and {tmp_path}/1 on rank 1",
        f"process_group must be all {pool.size} ranks for this, got 2 of them",
    ]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got dict"):
        pmk.distributed.save(tmp_path, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plain tensors, got int for _extra_state"):
        pmk.distributed.save(tmp_path, WithMore(3, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"could not save .*file, which keeps the last checkpoint published: "):
        pmk.distributed.save(tmp_path / "file", pmk.MarginSoftmaxLoss(3, 2))


def full(group: Any, path: Path, in_background: bool) -> tuple[str, list[str], bool]:
    """Save, and again with a rank that has no room; return the error, what was logged, whether the first is left."""
    loss_fn, said = pmk.MarginSoftmaxLoss(90, DIM, process_group=group), Said()
    pmk.distributed.save_async(path, loss_fn).result(60)  # its group is made while the disk has room
    before = held(loss_fn)
    loss_fn.reset_parameters()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that it is an OSError, as where a disk is full
    logging.getLogger("protomem_kernels").addHandler(said)
    if loss_fn.ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    message = ""
    try:
        if in_background:
            message = str(pmk.distributed.save_async(path, loss_fn).exception(60))
        else:
            pmk.distributed.save(path, loss_fn)
    except RuntimeError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signals)
    time.sleep(0.1 if in_background else 0)  # what waits for a future may be told before those whom it calls
    logging.getLogger("protomem_kernels").removeHandler(said)
    pmk.distributed.load(path, loss_fn)
    return message, said.lines, same(held(loss_fn), before)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_of_one_rank_is_an_error_on_all(pool: Pool, in_background: bool, tmp_path: Path) -> None:
    answers = pool.run(pool.size, full, tmp_path, in_background)
    for rank, (message, said, kept) in enumerate(answers):
        assert message.startswith(
            f"rank {rank} of {pool.size} could not save {tmp_path}, which keeps the last checkpoint"
        )
        assert message.endswith("File too large (rank 1)")
        assert said == ([message] if in_background else [])
        assert kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("learnable", [False, True])
def test_rows_of_every_kind(dtype: torch.dtype, learnable: bool, tmp_path: Path) -> None:
    small = pmk.PrototypeMemory(8, DIM, dtype=dtype, learnable=learnable)
    large = pmk.PrototypeMemory(12, DIM, dtype=dtype, learnable=learnable)
    for start in range(0, 12, 4):
        small.update(torch.randn(4, DIM), torch.arange(start, start + 4))
    pmk.distributed.save(tmp_path, small)
    parameters = dict(large.named_parameters())
    pmk.distributed.load(tmp_path, large)
    assert large.identities.tolist() == [*range(4, 12), -1, -1, -1, -1]
    assert torch.equal(large.prototypes[:8], small.prototypes[small.lookup(torch.arange(4, 12))])
    assert (int(large.cursor), int(large.clock)) == (8, 3)
    large.state.validate()
    assert all(value is parameters[name] for name, value in large.named_parameters())


# A rank that is killed


def killed(group: Any, data: Any, path: Path, victim: int, at: int) -> None:
    """Save, train on, and have a rank die in mid-save, at its so-manieth fsync; others leave word."""
    loss_fn = cases.head(OPTIONS, group)
    steps(loss_fn, data[:1])
    pmk.distributed.save(path, loss_fn)
    steps(loss_fn, data[1:])
    if loss_fn.ranks.rank == victim:
        fsync, calls = os.fsync, []

        def dying(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = dying
    begun = time.monotonic()
    try:
        pmk.distributed.save(path, loss_fn)
    except RuntimeError as error:
        (path / "word").write_text(f"{time.monotonic() - begun:.1f} {error}")
        raise


@pytest.mark.parametrize(
    ("victim", "at"), [(1, 1), (0, 2)], ids=["its rows are half there", "all but the manifest's name"]
)
def test_a_rank_killed_in_mid_save_leaves_the_last_checkpoint(victim: int, at: int, tmp_path: Path) -> None:
    data = cases.batches(2, 24)
    own = Pool(2)
    try:
        with pytest.raises((EOFError, ConnectionResetError)):
            own.run(2, killed, data, tmp_path, victim, at, breaks_within=20)
    finally:
        own.close()
    seconds, message = (tmp_path / "word").read_text().split(" ", 1)
    assert float(seconds) < 15
    assert f"rank {1 - victim} of 2 could not save" in message
    wanted, found = cases.head(OPTIONS), cases.head(OPTIONS)
    steps(wanted, data[:1])
    pmk.distributed.load(tmp_path, found)
    rows = by_identity(memory_of(held(found)))
    assert [one[:2] for one in rows] == [one[:2] for one in by_identity(memory_of(held(wanted)))]
    pmk.distributed.save(tmp_path, found)  # and what was left half-written goes
    assert len(list(tmp_path.glob("*.rows"))) == 1


def stepped(group: Any, options: dict[str, Any], data: Any, path: Path, kind: str, saves: bool) -> Any:
    """Train with an optimiser of the memory's rows and save, or load and return rows and moments by identity."""
    head = cases.head({**options, "prototype_gradient": "memory"}, group)
    encoder = torch.nn.Linear(DIM, DIM, dtype=torch.float64)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(DIM))
    optimizer = getattr(torch.optim, kind)([*encoder.parameters(), *head.parameters()], lr=0.01)
    head.attach_optimizer(optimizer)
    if not saves:
        pmk.distributed.load(path, head, optimizer)
    for e, labels, _ in data:
        sizes = cut(len(e), head.ranks.size, "even")
        loss = head(encoder(part(e, sizes, head.ranks.rank)), part(labels, sizes, head.ranks.rank))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if saves:
        pmk.distributed.save(path, head, optimizer)
    kept = optimizer.state[head.memory.prototypes]
    key = {"AdamW": "exp_avg_sq", "Adagrad": "sum"}[kind]
    here = head.memory.identities >= 0
    there = zip(
        head.memory.identities[here].tolist(), kept[key][here], head.memory.prototypes.detach()[here], strict=True
    )
    return {identity: (moments, row) for identity, moments, row in there}, float(kept["step"])


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad"])
@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 2), (2, 1), (1, 3)])
def test_what_an_optimiser_keeps_goes_with_the_rows(
    pool: Pool, before: int, after: int, kind: str, tmp_path: Path
) -> None:
    data = cases.batches(3, 24)
    saved = run(pool, before, stepped, OPTIONS, data, tmp_path, kind, True)
    loaded = run(pool, after, stepped, OPTIONS, [], tmp_path, kind, False)
    ours, wanted = ({k: v for state, _ in ranks for k, v in state.items()} for ranks in (loaded, saved))
    assert len(wanted) > 15
    assert ours.keys() == wanted.keys()
    for identity, (moments, row) in wanted.items():
        assert torch.equal(ours[identity][0], moments)
        assert torch.equal(ours[identity][1], row)
        assert bool(moments.abs().sum() > 0)
    assert {step for _, step in loaded} == {3.0}


def test_what_an_optimiser_keeps_of_whole_shards_is_refused(tmp_path: Path, pool: Pool) -> None:
    """As 8-bit states do, one scale for a block of numbers."""
    head = cases.head({**OPTIONS, "prototype_gradient": "memory"})
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    optimizer.state[head.memory.prototypes]["absmax"] = torch.ones(7)
    with pytest.raises(
        TypeError, match=r"a row for each of 60 rows .* or one number, got \(7,\) for memory.prototypes@absmax"
    ):
        pmk.distributed.save(tmp_path, head, optimizer)
    assert not list(tmp_path.iterdir())


def test_an_optimiser_of_something_else_is_refused(tmp_path: Path) -> None:
    head = cases.head({**OPTIONS, "prototype_gradient": "memory"})
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got dict"):
        pmk.distributed.save(tmp_path, head, {})
    stepped(None, OPTIONS, cases.batches(1, 24), tmp_path, "AdamW", True)
    with pytest.raises(
        ValueError, match="optimizer must have the parameters that were saved with one, got none of memory"
    ):
        pmk.distributed.load(tmp_path, head, other)


@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_a_plain_state_dict_loads_into_ranks(pool: Pool, policy: str, tmp_path: Path) -> None:
    options = {**OPTIONS, "policy": policy}
    data = cases.batches(6, 24)
    undisturbed = cases.head(options)
    steps(undisturbed, data[:4])
    plain = held(undisturbed)
    loss = steps(undisturbed, data[4:])
    for _, ours, said in pool.run(3, resumed, options, data[4:], plain):
        assert said == []
        assert abs(float(ours - loss)) < 1e-10
