"""Runs in several processes: by torchrun itself, or by processes that have torch already, which start in no time."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import torch

from protomem_kernels.distributed.storage import Folder
from protomem_kernels.training import checkpoints
from tests.training import killed
from tests.training.running import figures
from tests.warm_processes import warm_processes

ROOT = Path(__file__).parents[2]
WARM = ("tests.training.launched", "protomem_kernels.data.evaluation", *killed.WARM)
# Four slots a process, for each of which there is always an identity of a batch; then what has state in several places.
OPTIONS = [
    ("--prototype-gradient", "fresh", "--margin", "adaface", "--policy", "lru", "--capacity", "12"),
    ("--prototype-gradient", "memory", "--mining", "curricularface"),
    ("--quality", "norm", "--margin", "adaface", "--mining", "hard-samples"),
    ("--prototype-gradient", "memory", "--quality", "center", "--mining", "mv-softmax", "--capacity", "12"),
]


def run_rank(environment, arguments, output):
    """Be one of a launcher's processes."""
    os.environ.update(environment)
    killed.run_in_child(arguments, output)


class Forked:
    """What torchrun does, with processes forked from one that has imported all: start, watch, end, start anew."""

    def __init__(self, ranks, arguments, output):
        self.ranks, self.arguments, self.output = ranks, [*map(str, arguments)], str(output)
        self.start_id, self.starts = uuid.uuid4().hex, 0
        self.start()

    def start(self):
        with socket.socket() as one:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
        shared = {"WORLD_SIZE": self.ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        context = warm_processes(*WARM)
        self.processes = []
        for rank in range(self.ranks):
            own = {
                **shared,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "GROUP_WORLD_SIZE": 1,
                "TORCHELASTIC_RUN_ID": self.start_id,
                "TORCHELASTIC_RESTART_COUNT": self.starts,
            }
            environment = {key: str(value) for key, value in own.items()}
            process = context.Process(target=run_rank, args=(environment, self.arguments, self.output))
            process.start()
            self.processes.append(process)
        self.starts += 1

    def runs(self):
        return all(process.is_alive() for process in self.processes)

    def workers(self):
        return [process.pid for process in self.processes if process.is_alive()]

    def said(self):
        """Return what its processes have printed."""
        return Path(self.output).read_text()

    def wait(self, seconds=120):
        """Return the exit codes."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes


class Torchrun:
    """torchrun itself, with one restart."""

    def __init__(self, ranks, arguments, output):
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1"]
        command = [sys.executable, "-m", *launch, "-m", "tests.training.launched", *map(str, arguments)]
        self.output = str(output)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(output, "ab") as file:
            self.agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    def said(self):
        """Return what torchrun and its processes have printed."""
        return Path(self.output).read_text()

    def runs(self):
        return self.agent.poll() is None

    def workers(self):
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"tests.training.launched" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def wait(self, seconds=240):
        """Return torchrun's exit code."""
        try:
            return [self.agent.wait(seconds)]
        except subprocess.TimeoutExpired:
            self.agent.kill()
            return [None]


def kill_one(launch, folder, step, rng):
    """Send SIGKILL to a process drawn at a moment drawn after a checkpoint of ``step``; return which, or None."""
    while launch.runs() and killed.step_of(folder) < step:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    workers = launch.workers()
    assert workers, launch.said()
    victim = rng.randrange(len(workers))
    os.kill(workers[victim], signal.SIGKILL)
    return victim


def difference(folder, calm):
    """Return the first thing in which a run ended otherwise than another one of its options, bit for bit, or None."""
    if list(folder.rglob(".writing-*")):
        return "something half-written is left"
    if figures(folder) != figures(calm):
        return f"figures: {figures(folder)} instead of {figures(calm)}"
    ours, theirs = (checkpoints.load_checkpoint(run / "checkpoint.pt") for run in (folder, calm))
    for part in ("step", "encoder", "average", "optimizer", "scaler"):
        try:
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            return f"{part}: {error}"
    ours, theirs = (Folder(run / content["head"]) for run, content in ((folder, ours), (calm, theirs)))
    for name in ours.names() | theirs.names():
        if not torch.equal(ours.read(name), theirs.read(name)):
            return f"the head's {name}"
    return None


def main() -> int:
    """Kill a random process of runs of three, at random moments, and let torchrun go on."""
    wanted = killed.arguments("of three processes, one of which is killed")
    began, equal = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as place:
        runs = killed.prepare(Path(place))
        common = ["train", "--config", Path(place) / "tiny.toml", "--steps", killed.STEPS, "--checkpoint-every", 1]
        for number in range(wanted.kills):
            kind, seed = number % len(OPTIONS), wanted.seed + number
            calm, folder = runs / f"calm{kind}", runs / f"killed{number}"
            if not calm.exists():
                launch = Torchrun(3, [*common, *OPTIONS[kind], "--name", calm.name], Path(place) / calm.name)
                assert launch.wait() == [0], launch.said()
            launch = Torchrun(3, [*common, *OPTIONS[kind], "--name", folder.name], Path(place) / folder.name)
            rng = random.Random(seed)
            victim = kill_one(launch, folder, rng.randrange(2, killed.STEPS - 5), rng)
            code = launch.wait()
            went_on = re.search(r"continuing after step (\d+)", launch.said())
            if code != [0] or went_on is None:
                differs = f"torchrun ended with {code}: {launch.said()[-6000:]}"
            else:
                differs = difference(folder, calm)
            equal += differs is None
            where = f"in step {int(went_on[1]) + 1} of {killed.STEPS}" if went_on else "?"
            print(f"seed {seed}: process {victim} killed {where}, resumed: {differs or 'bit-equal'}", flush=True)
    seconds = time.monotonic() - began
    print(f"{equal} of {wanted.kills} runs of three processes resumed bit-equal, in {seconds:.0f} s")
    return int(equal < wanted.kills)


if __name__ == "__main__":
    killed.run_quietly(sys.argv[1:])
