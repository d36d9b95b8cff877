"""The command: its options, the parts one after another, the one JSON in the end, the exit code."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from protomem_kernels.gpu_check import suite
from protomem_kernels.gpu_check.device import STAND_IN, environment, found
from protomem_kernels.gpu_check.plan import PARTS, at_once
from protomem_kernels.gpu_check.processes import Runner, Setting
from protomem_kernels.gpu_check.records import Record, merged, shown, write_whole

WRONG, CANNOT = 1, 2  # exit codes: something was wrong; the check cannot be done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``protomem gpu-check`` with these arguments (default: those after its name), and return the exit code."""
    options = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    device = found()
    parts = [PARTS[name] for name in options.parts or PARTS]
    if device is None:
        built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return _cannot(
            f"protomem gpu-check needs a GPU; torch {torch.__version__}, built {built}, sees none here. With one it "
            f"would spend at most {options.minutes:g} minutes on {'; '.join(part.title for part in parts)}, and write "
            f"{options.output.name} ({STAND_IN}=cpu tries that out on a CPU)"
        )
    lines = options.output.with_suffix(".jsonl")
    if options.output.is_dir() or lines == options.output:
        return _cannot(f"--output must be a file, not a folder and not .jsonl, got {options.output}")
    try:
        lines.write_text("", encoding="utf-8")
    except OSError as problem:
        return _cannot(f"cannot write {lines}: {problem.strerror}")
    return _check(options, device, lines)


def _cannot(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return CANNOT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "protomem gpu-check",
        description="Look at everything that needs a GPU, within a budget of time, and write one JSON file to send "
        "back: the environment, every kernel beside float64, speed, whole steps, sanitizer, counters, the GPU suite. "
        "No paths and no names of machines or people are in it. What was found stands in the .jsonl file beside it at "
        "any moment. Exit code 1: something was wrong; 2: the check cannot be done.",
        epilog="example: protomem gpu-check --minutes 3 --parts correctness",
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="the budget (default: 9)")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-check.json"), help="the file to write (default: gpu-check.json)"
    )
    parser.add_argument(
        "--checkout", type=Path, default=Path(), help="whose tests are run (default: the current folder)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"only these of {', '.join(PARTS)}"
    )
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _check(options: argparse.Namespace, device: str, lines: Path) -> int:
    """Run the parts, merge what they wrote, and return the exit code. Nothing here touches the device."""
    began, start, complete = time.time(), time.monotonic(), False
    names = list(options.parts or PARTS)
    end = start + 60 * options.minutes
    where = "a GPU" if device == "cuda" else "a CPU that stands in for a GPU"
    print(f"protomem gpu-check on {where}: at most {options.minutes:g} minutes; lines in {lines}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            lines.resolve(),
            began,
            options.checkout.resolve(),
            Path(folder),
            {**environment(), **suite.WITHOUT_PLUGINS, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            _show,
        )
        runner = Runner(setting)
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for name in names:
                part, record = PARTS[name], Record(setting.lines, began, name)
                seconds = min(end - time.monotonic(), part.share * (end - start))
                try:
                    absent = part.absent(setting.checkout)
                    if absent is None:
                        runner.run(name, part.tasks(setting.checkout), at_once(part), seconds)
                    else:
                        record.write("left out", None, absent)
                except Exception as problem:  # of this process; the next part is another matter
                    runner.stop()
                    record.write("the part itself", False, f"{type(problem).__name__}: {problem}")
                runner.listen()
            complete = True
        except KeyboardInterrupt:
            print("interrupted: what was found so far is written", file=sys.stderr)
        finally:
            runner.stop()
            signal.signal(signal.SIGTERM, before)
            runner.listen()
    content = merged(runner.seen, complete)
    write_whole(options.output, content)
    for wrong in content["wrong"]:
        print(f"wrong: {' '.join(wrong.split())[:300]}")
    print(f"written: {options.output} ({len(content['wrong'])} wrong; please send it back)")
    return WRONG if content["wrong"] or not complete else 0


def _show(line: dict[str, Any]) -> None:
    text = shown(line)
    if text is not None:
        print(text, flush=True)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
