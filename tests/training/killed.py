"""Runs killed at random moments, and resumed: they must come to what the undisturbed run comes to, bit for bit.

``make faults`` kills twenty of them and prints each one's seed; ``ARGS='--seed N'`` begins with that seed again. Every
step writes a checkpoint, so a kill is as likely to fall into a write as between two of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protomem_kernels.training import checkpoints, report
from tests.training.running import TINY, draw_people, figures
from tests.warm_processes import warm_processes

STEPS = 40
WARM = ("protomem_kernels.cli.app", "torch.utils.tensorboard", "torch._dynamo")  # what a run imports on its way
# What a run has state of: the memory and its ring, the margin's and the quality's statistics, the optimiser's moments.
OPTIONS = [
    ("--prototype-gradient", "fresh", "--margin", "adaface", "--policy", "lru", "--capacity", "4"),
    ("--prototype-gradient", "memory", "--mining", "curricularface"),
    ("--quality", "norm", "--margin", "adaface", "--mining", "hard-samples"),
    ("--quality", "softmax:base=center", "--mining", "mv-softmax", "--capacity", "4"),
]


class Killed(NamedTuple):
    """A run that was killed and resumed.

    Attributes:
        seed: of the moment.
        step: of the checkpoint that it left.
        half_written: whether the kill fell into the writing of a file.
        differs: where the resumed run ended otherwise than the undisturbed one, or None.
    """

    seed: int
    step: int
    half_written: bool
    differs: str | None


def run_in_child(arguments: list[str], output: str) -> None:
    """Run ``protomem`` in this process, its output in a file, without pictures."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    run_quietly(arguments)


def run_quietly(arguments: list[str]) -> None:
    """Run ``protomem`` in this process, without pictures."""
    for name in ("draw_roc", "draw_pairs"):
        setattr(report, name, lambda *arguments, **options: None)
    sys.argv = ["protomem", *arguments]
    from protomem_kernels.cli import main

    main()


def start(folder: Path, *options: object) -> Any:
    """Start a run in a process of its own and return that; what it prints goes to ``output`` beside its folder."""
    config, name = folder.parents[1] / "tiny.toml", folder.name
    arguments = ["train", "--config", config, "--name", name, "--steps", STEPS, "--checkpoint-every", 1, *options]
    output = str(folder.with_name(f"{name}.output"))
    context = warm_processes("tests.training.killed", "protomem_kernels.data.evaluation", *WARM)
    process = context.Process(target=run_in_child, args=([*map(str, arguments)], output))
    folder.parent.mkdir(exist_ok=True)
    process.start()
    return process


def output_of(folder: Path) -> str:
    """Return what runs of this folder have printed."""
    return folder.with_name(f"{folder.name}.output").read_text()


def train_to_the_end(folder: Path, *options: object) -> None:
    """Run in a process of its own, to the end."""
    process = start(folder, *options)
    process.join()
    assert process.exitcode == 0, output_of(folder)


def step_of(folder: Path) -> int:
    """Return the step of the checkpoint of a run that may be writing the next one, 0 without one."""
    checkpoint = folder / "checkpoint.pt"
    return int(checkpoints.load_checkpoint(checkpoint)["step"]) if checkpoint.exists() else 0


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    """Wait until a run has a checkpoint of this step."""
    while process.is_alive() and step_of(folder) < step:
        time.sleep(0.001)


def kill_and_resume(folder: Path, calm: Path, seed: int, *options: object) -> Killed:
    """Kill a run with SIGKILL at a moment drawn with ``seed``, resume it, and compare it with the undisturbed one."""
    rng = random.Random(seed)
    process = start(folder, *options)
    wait_for_step(folder, rng.randrange(2, STEPS - 5), process)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, output_of(folder)
    step = step_of(folder)
    assert 0 < step < STEPS, f"seed {seed}: killed with a checkpoint of step {step}, which is not in the middle"
    half_written = bool(list(folder.glob(".writing-*")))
    train_to_the_end(folder, "--resume", *options)
    assert f"continuing after step {step}" in output_of(folder)
    return Killed(seed, step, half_written, difference(folder, calm))


def difference(folder: Path, calm: Path) -> str | None:
    """Return the first thing in which a run ended otherwise than another one of its options, bit for bit, or None."""
    if list(folder.glob(".writing-*")):
        return "something half-written is left"
    if figures(folder) != figures(calm):
        return f"figures: {figures(folder)} instead of {figures(calm)}"
    ours, theirs = (checkpoints.load_checkpoint(run / "checkpoint.pt") for run in (folder, calm))
    for part in ("step", "encoder", "average", "loss", "optimizer", "scaler"):
        try:
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            return f"{part}: {error}"
    return None


def prepare(folder: Path) -> Path:
    """Make the images and the options of the runs in a folder, and return where the runs go."""
    people, runs = folder / "people", folder / "runs"
    draw_people(people)
    lines = f"data = {json.dumps(str(people))}\nruns_dir = {json.dumps(str(runs))}\n"
    (folder / "tiny.toml").write_text(TINY + lines)
    return runs


def arguments(what: str) -> argparse.Namespace:
    """Return what the command line of a long suite asks for."""
    parser = argparse.ArgumentParser(prog="make faults", description=f"Runs {what}, and resumed.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="of the first kill; then one more each"
    )
    return parser.parse_args()


def main() -> int:
    wanted = arguments("that are killed")
    began, equal, half = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as place:
        runs = prepare(Path(place))
        for number in range(wanted.kills):
            kind = number % len(OPTIONS)
            calm, options = runs / f"calm{kind}", OPTIONS[kind]
            if not calm.exists():
                train_to_the_end(calm, *options)
            verdict = kill_and_resume(runs / f"killed{number}", calm, wanted.seed + number, *options)
            equal += verdict.differs is None
            half += verdict.half_written
            where = "while it wrote, " if verdict.half_written else ""
            end = verdict.differs or "bit-equal"
            print(
                f"seed {verdict.seed}: killed {where}after step {verdict.step} of {STEPS}, resumed: {end}", flush=True
            )
    seconds = time.monotonic() - began
    print(f"{equal} of {wanted.kills} resumed bit-equal, {half} were killed in a write, in {seconds:.0f} s")
    return int(equal < wanted.kills)
