"""A run in several processes: as one process runs it, said and written by the first, ended together."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from protomem_kernels.distributed.ranks import ALONE, Ranks
from protomem_kernels.training import checkpoints, loop, report, steps
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.processes import share
from tests.distributed.conftest import _pools, pool
from tests.training import killed, launched
from tests.training.running import assert_refused, figures, protomem, train

__all__ = ["_pools", "pool"]


class Rank(Ranks):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("identities", "ranks"), [(4, 1), (4, 2), (5, 3), (3, 3)])
def test_a_batch_is_shared_out_once_and_by_whole_identities(identities, ranks):
    batch = torch.randperm(identities * 2, generator=torch.Generator().manual_seed(0)).tolist()
    shares = [share(batch, 2, Rank(rank, ranks)) for rank in range(ranks)]
    assert sorted(image for part in shares for image in part) == sorted(batch)
    groups = {tuple(batch[i : i + 2]) for i in range(0, len(batch), 2)}
    assert all(tuple(part[i : i + 2]) in groups for part in shares for i in range(0, len(part), 2))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


def test_a_batch_too_small_to_share():
    with pytest.raises(RunError, match="identities_per_batch must leave each of 3 processes an identity"):
        share([0, 1, 2, 3], 2, Rank(0, 3))


def in_rank(group, arguments, at=None, do=None):
    """Run ``protomem`` on one of the pool's ranks; return its exit code and what it said. ``do`` happens in a step."""
    advance = steps.Training.advance

    def advance_and(self, images, labels):
        step = advance(self, images, labels)
        if self.step == at:
            do(self)
        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_roc", "draw_pairs"):
            patch.setattr(report, name, lambda *arguments, **options: None)
        if at is not None:
            patch.setattr(steps.Training, "advance", advance_and)
        result = protomem("train", *arguments)
    return result.exit_code, result.stdout, result.stderr, repr(result.exception)


def run(pool, *arguments, **options):
    """Run ``protomem train`` on the pool's three ranks."""
    return pool.run(3, in_rank, [*map(str, arguments)], *options.values())


def stop(training):
    """Ask the second process alone to stop, as a scheduler may."""
    if training.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("mode", ["none", "memory"])
def test_three_processes_stopped_and_resumed_come_to_what_three_come_to(tiny, tmp_path, pool, mode):
    options = (
        "--config",
        tiny,
        "--prototype-gradient",
        mode,
        "--margin",
        "adaface",
        "--steps",
        6,
        "--validate-every",
        2,
    )
    runs = tmp_path / "runs"
    assert run(pool, *options, "--name", "calm")[1:] == [(0, "", "", "None")] * 2
    assert figures(runs / "calm")["processes"] == 3
    assert {path.name for path in (runs / "calm").glob("head-*")} == {"head-a"}

    first, *others = run(pool, *options, "--name", "stopped", at=3, do=stop)
    assert (first[0], first[2].split(";")[0]) == (143, "stopped by SIGTERM after step 3 of 6")
    assert [(code, said, told) for code, said, told, _ in others] == [(143, "", "")] * 2
    assert [code for code, *_ in run(pool, *options, "--name", "stopped", "--resume")] == [0, 0, 0]
    assert launched.difference(runs / "stopped", runs / "calm") is None


def test_any_number_of_processes_goes_on_with_the_run_of_another(tiny, tmp_path, pool):
    """The memory of 6 identities, the moments of its rows, and the loss goes on from there."""
    # Rows that a return moves by little: what stands near where it was is then the same row.
    chosen = ("--prototype-gradient", "memory", "--refresh-ratio", "0.2", "--name", "moves")
    options = ("--config", tiny, *chosen)
    folder = tmp_path / "runs" / "moves"
    assert [code for code, *_ in run(pool, *options)] == [0, 0, 0]
    three = memory(folder)
    assert train(tiny, *chosen, "--resume", "--steps", 5).exit_code == 0
    assert not list(folder.glob("head-*"))
    one = memory(folder)
    assert [code for code, *_ in run(pool, *options, "--resume", "--steps", 6)] == [0, 0, 0]
    for before, after in ((three, one), (one, memory(folder))):
        assert before.keys() == after.keys()
        assert len(before) == 6
        for identity, (row, moments) in before.items():
            # A step or two of training apart: the same person's row, near where it was, with moments of its own.
            assert torch.cosine_similarity(row, after[identity][0], dim=0) > 0.9
            assert torch.cosine_similarity(moments, after[identity][1], dim=0) > 0.5


def memory(folder):
    """Return the rows of a run's memory and their moments, by identity, whoever has saved them."""
    content = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    if content.get("head"):
        saved = launched.Folder(folder / content["head"])
        rows, moments, identities = (
            saved.read(f"memory.{name}") for name in ("prototypes", "prototypes@exp_avg", "identities")
        )
    else:
        rows, identities = content["loss"]["memory.prototypes"], content["loss"]["memory.identities"]
        moments = next(m["exp_avg"] for m in content["optimizer"]["state"].values() if m["exp_avg"].shape == rows.shape)
    there = zip(identities.tolist(), rows, moments, strict=True)
    return {identity: (row, moment) for identity, row, moment in there if identity >= 0}


def damaged(folder, how):
    rows = sorted(folder.glob("head-*/*.rows"))
    head = rows[0].parent
    if how == "truncated":
        with rows[1].open("rb+") as file:
            file.truncate(rows[1].stat().st_size // 2)
        return f"{rows[1]} was cut off"
    if how == "foreign":
        rows[2].write_bytes(rows[0].read_bytes())
        return str(rows[2])
    if how == "no manifest":
        (head / "manifest.json").unlink()
        return f"{head} holds no checkpoint: there is no manifest.json"
    shutil.copytree(folder.with_name("other") / head.name, head, dirs_exist_ok=True)
    return f"{head} is not the one that {folder / 'checkpoint.pt'} was saved with"


def test_a_damaged_head_is_refused_in_one_line(tiny, tmp_path, pool):
    options = ("--config", tiny, "--steps", 2)
    runs = tmp_path / "runs"
    for name, seed in (("whole", 0), ("other", 1)):
        assert [code for code, *_ in run(pool, *options, "--name", name, "--seed", seed)] == [0, 0, 0]
    for how in ("truncated", "foreign", "no manifest", "of another run"):
        folder = runs / how
        shutil.copytree(runs / "whole", folder)
        (folder / "config.toml").write_text((runs / "whole" / "config.toml").read_text().replace('"whole"', f'"{how}"'))
        expected = damaged(folder, how)
        first, *others = run(pool, *options, "--steps", 4, "--name", how, "--resume")
        assert (first[0], first[2].count("\n")) == (2, 1), first
        assert expected in first[2]
        assert [(code, told) for code, _, told, _ in others] == [(2, "")] * 2
        assert_refused(train(tiny, "--steps", 4, "--name", how, "--resume"), expected)


def write_no_more(training):
    """Have the disk of the third process be full."""
    import resource

    if training.ranks.rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def write_again(group):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def test_a_full_disk_of_one_process_leaves_the_last_checkpoint_whole(tiny, tmp_path, pool):
    options = ("--config", tiny, "--steps", 6, "--name", "full")
    try:
        told = run(pool, *options, at=3, do=write_no_more)
    finally:
        pool.run(3, write_again)
    assert [code for code, *_ in told] == [2, 2, 2]
    lines = "".join(error for _, _, error, _ in told)
    assert "File too large" in lines
    assert "the checkpoint of step 2 is whole" in lines
    assert lines.count("\n") == 1
    assert [code for code, *_ in run(pool, *options, "--resume")] == [0, 0, 0]
    assert figures(tmp_path / "runs" / "full")["steps"] == 6


def fail_to_publish(training):
    """Have the file of the next checkpoint fail, after all processes have written their parts of the head."""
    if training.ranks.rank == 0:
        save = checkpoints.save_checkpoint

        def fail(path, content):
            checkpoints.save_checkpoint = save
            raise RunError(f"cannot write {path}: no more today")

        checkpoints.save_checkpoint = fail


def test_between_the_head_and_the_file_the_last_checkpoint_is_whole(tiny, tmp_path, pool):
    options = ("--config", tiny, "--steps", 6)
    runs = tmp_path / "runs"
    assert [code for code, *_ in run(pool, *options, "--name", "calm")] == [0, 0, 0]
    first, *others = run(pool, *options, "--name", "failed", at=3, do=fail_to_publish)
    assert "no more today; the checkpoint of step 2 is whole" in first[2]
    assert [(code, told) for code, _, told, _ in others] == [(2, "")] * 2
    assert [code for code, *_ in run(pool, *options, "--name", "failed", "--resume")] == [0, 0, 0]
    assert launched.difference(runs / "failed", runs / "calm") is None


def differing(group, tiny):
    return in_rank(group, ["--config", str(tiny), "--seed", str(int(group.rank() == 2))])


def test_options_that_differ_are_named(tiny, pool):
    first, *others = pool.run(3, differing, tiny)
    assert first[:3] == (2, "", "error: seed must be the same in all processes, got 0 and 1\n")
    assert [(code, told) for code, _, told, _ in others] == [(2, "")] * 2


def test_what_all_refuse_is_said_once(tiny, pool):
    first, *others = run(pool, "--config", tiny, "--capacity", 3)
    assert first[0] == 2
    assert first[2].startswith("error: capacity must be at least the identities of a batch (4")
    assert [(code, told) for code, _, told, _ in others] == [(2, "")] * 2


def test_a_killed_process_ends_the_others_at_once_and_the_next_start_goes_on(tmp_path):
    """A short form of ``make faults``, without torchrun: the seed is new each time, and stands in what fails."""
    runs = killed.prepare(tmp_path)
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    common = ["train", "--config", tmp_path / "tiny.toml", "--steps", killed.STEPS, "--checkpoint-every", 1]
    options = [*common, *launched.OPTIONS[0]]
    calm = launched.Forked(2, [*options, "--name", "calm"], tmp_path / "calm.output")
    launch = launched.Forked(2, [*options, "--name", "killed"], tmp_path / "killed.output")
    victim = launched.kill_one(launch, runs / "killed", rng.randrange(2, killed.STEPS - 5), rng)
    began = time.monotonic()
    codes = launch.wait(60)
    assert time.monotonic() - began < 20
    said = launch.said()
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 2), (seed, said)
    assert said.count("error: ") == 1, said
    assert "lost another one in step" in said
    assert "is whole, go on with" in said
    launch.start()  # as torchrun --max-restarts does
    assert launch.wait() == [0, 0], (seed, launch.said())
    assert calm.wait() == [0, 0], calm.said()
    assert "continuing after step" in launch.said()
    assert [path.name for path in runs.iterdir() if path.is_dir()].count("killed-2") == 0
    assert launched.difference(runs / "killed", runs / "calm") is None, seed


def test_what_torchrun_starts_anew_goes_on_and_what_it_starts_does_not(tmp_path, monkeypatch):
    """The same --rdzv-id for two runs, and a restart of the second."""
    config = TrainConfig(runs_dir=str(tmp_path), name="run")
    for name, value in (("GROUP_WORLD_SIZE", "1"), ("TORCHELASTIC_RUN_ID", "job")):
        monkeypatch.setenv(name, value)
    folders = []
    for restarts in (0, 0, 1, 2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        with loop.run_folder(config, None, ALONE) as folder:
            folders.append(folder.name)
    assert folders == ["run", "run-2", "run-2", "run-2"]
