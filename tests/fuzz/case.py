"""One case: a subject, a seed, and what came of it."""

from __future__ import annotations

import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from tests.fuzz.draw import Draw
from tests.fuzz.known import why_known
from tests.fuzz.places import again
from tests.fuzz.subjects import SUBJECTS
from tests.fuzz.verdict import GPU_KERNELS, BrokenRuleError


class Outcome(NamedTuple):
    """``rule`` is "" where nothing was found; ``known`` says why a finding does not count."""

    subject: str
    seed: int
    rule: str = ""
    message: str = ""
    known: str = ""

    def __str__(self) -> str:
        return f"{self.rule}\n  {self.message}\n  again: {again(self.subject, self.seed)}"


def run_case(subject: str, seed: int) -> Outcome:
    """Run a case in this process."""
    draw = Draw(subject, seed)
    torch.manual_seed(draw.random.getrandbits(62))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SUBJECTS[subject](draw)
    except BrokenRuleError as finding:
        rule, said = finding.rule, str(finding).removeprefix(f"{finding.rule}: ")
    except Exception as error:
        if "cannot serve" in str(error) and str(draw.notes.get("backend")).startswith(GPU_KERNELS):
            return Outcome(subject, seed)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        rule = f"{subject}: {type(error).__name__}"
        said = f"{error} ({Path(frame.filename).name}:{frame.lineno}, in {frame.name})"
    else:
        return Outcome(subject, seed)
    notes = ", ".join(f"{name}={value}" for name, value in draw.notes.items())
    said = f"{said[:600]}\n  inputs: {notes}"
    return Outcome(subject, seed, rule, said, why_known(rule, said) or "")
