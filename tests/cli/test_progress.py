"""What a person sees of a run, on a terminal, in a file and in TensorBoard."""

import io
import itertools
import re
import subprocess
import sys

import pytest
from rich.console import Console

from protomem_kernels.cli import lines
from protomem_kernels.cli.progress import Display, result_table
from protomem_kernels.training.config import config_from, read_toml
from protomem_kernels.training.loop import run_training
from protomem_kernels.training.steps import Step
from tests.training.killed import prepare
from tests.training.running import train


def test_events_hold_the_loss_of_every_step(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tiny, "--name", "events").exit_code == 0
    events = EventAccumulator(str(tmp_path / "runs" / "events")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("train/occupancy")[-1].value == 1.0
    assert [event.step for event in events.Scalars("health/target_cosine")] == [1]  # the first of every fifty
    assert events.Histograms("health/age")[0].histogram_value.num > 0


def test_a_file_gets_lines_and_a_terminal_a_bar(tiny):
    shown = {}
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=60, color_system=None)
        run_training(config_from(read_toml(tiny), ""), watch=Display(console))
        shown[terminal] = console.file.getvalue()
    steps = re.findall(r"^\d\d:\d\d:\d\d step (\d) of 4, loss [\d.]+, memory \d+%$", shown[False], flags=re.MULTILINE)
    assert steps == ["1", "2", "3", "4"]
    assert "eta" not in shown[False]
    assert "eta" in shown[True]
    assert "step 1 of 4" not in shown[True]
    assert not lines.LOG.handlers


def test_lines_come_with_the_steps_and_with_the_time(monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(lines.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    written = lines.Lines(stream)
    written.start(30, 1000)
    for number in range(31, 121):
        written.show(Step(number, 1.5, 0.1, 0.5, 1.0), 1.25)
    written.stop()
    numbers = [int(number) for number in re.findall(r"step (\d+) of 1000, loss 1.250, memory 50%", stream.getvalue())]
    assert numbers[0] == 31
    assert {50, 100} < set(numbers)
    assert max(late - early for early, late in itertools.pairwise(numbers)) == 5  # 35 seconds


def test_the_output_of_a_pipe_grows_while_the_run_goes_on(tmp_path):
    prepare(tmp_path)
    command = [sys.executable, "-m", "protomem_kernels", "train", "--config", str(tmp_path / "tiny.toml")]
    with subprocess.Popen([*command, "--steps", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any(b" step 1 of 1000000, " in line for line in process.stdout)  # hours before the end
        process.terminate()
        assert process.stderr.read().startswith(b"stopped by SIGTERM after step ")


class Closed(io.StringIO):
    def write(self, text):
        if " step " in text:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_lines_that_cannot_be_written_are_told_to_the_run():
    written = lines.Lines(Closed())
    written.start(0, 10)
    with pytest.raises(BrokenPipeError):
        written.show(Step(1, 1.5, 0.1, 0.5, 1.0), 1.5)
    written.stop()


def test_the_table_fits_sixty_columns_and_the_last_line_says_the_way_on(tiny, tmp_path):
    metrics = run_training(config_from(read_toml(tiny), ""))
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(result_table(metrics))
    table = console.file.getvalue()
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 60
    assert "identities never trained on" in table
    last = train(tiny, "--name", "my run").stdout.splitlines()[-1]
    assert last == f"next:  protomem verify A.jpg B.jpg --run '{tmp_path / 'runs' / 'my run'}'"


def test_brackets_in_names_are_shown(tiny, tmp_path):
    result = train(tiny, "--runs-dir", tmp_path / "my runs [old] set[/b]", "--name", "[v2]")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/my runs [old] set[/b]/[v2]: " in result.stdout
    assert f"files: {tmp_path}/my runs [old] set[/b]/[v2] (encoder.pt, metrics.json" in result.stdout
