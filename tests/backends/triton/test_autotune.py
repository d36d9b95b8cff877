"""Launch parameters by trial: the fastest variant, kept on disk; whatever the file holds, a call goes through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from protomem_kernels.backends.triton import autotune, launch
from protomem_kernels.backends.triton.launch import Launch

CPU = torch.device("cpu")
CALL = ("stream with moment", CPU, torch.bfloat16, 100)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    pytest.importorskip("triton")
    monkeypatch.setenv("PROTOMEM_AUTOTUNE", "1")
    monkeypatch.setenv("PROTOMEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_found", {})
    return autotune.cache_file(CPU)


class Device:
    """Stands for a kernel: notes its launches, and takes as long as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fastest: Launch) -> None:
        self.fastest, self.launches, self.now = fastest, [], 0.0
        monkeypatch.setattr(autotune.time, "perf_counter", lambda: self.now)

    def run(self, how: Launch) -> None:
        self.launches.append(how)
        self.now += 1.0 if how == self.fastest else 2.0


def table() -> Launch:
    return launch.choose(CALL[0], launch.architecture(CPU), *CALL[2:])


def test_nothing_is_timed_unless_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROTOMEM_AUTOTUNE")
    device = Device(monkeypatch, table())
    assert autotune.best(*CALL, device.run) == table()
    assert device.launches == []
    assert not cache.exists()


def test_the_fastest_is_kept_for_the_next_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = table()._replace(slots=table().slots // 2)
    device = Device(monkeypatch, fastest)
    assert autotune.best(*CALL, device.run) == fastest
    assert set(device.launches) == set(autotune.variants(table()))
    launches = len(device.launches)
    assert autotune.best(*CALL, device.run) == fastest
    monkeypatch.setattr(autotune, "_found", {})  # another process
    assert autotune.best(*CALL[:3], 128, device.run) == fastest  # the same bucket: both are padded to 128
    assert len(device.launches) == launches
    autotune.best(*CALL[:3], 300, device.run)
    assert len(device.launches) > launches
    assert len(json.loads(cache.read_text())) == 2
    assert list(cache.parent.iterdir()) == [cache]  # nothing half-written stays


def test_what_another_process_found_is_not_lost(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, table())
    autotune.best(*CALL, device.run)
    theirs = json.loads(cache.read_text()) | {"another": table()._asdict()}
    cache.write_text(json.dumps(theirs))
    autotune.best(*CALL[:3], 300, device.run)
    assert "another" in json.loads(cache.read_text())


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"rows": 1}}', '{"a": {"rows": "x"}}', "\x00"], ids=range(6)
)
def test_a_broken_file_is_ignored_with_a_warning(cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    device = Device(monkeypatch, table())
    with pytest.warns(UserWarning, match="is ignored, launch parameters are timed again"):
        assert autotune.best(*CALL, device.run) == table()
    assert json.loads(cache.read_text())


def test_parameters_that_are_none_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, table())
    autotune.best(*CALL, device.run)
    entries = json.loads(cache.read_text())
    next(iter(entries.values()))["warps"] = -4
    cache.write_text(json.dumps(entries))
    monkeypatch.setattr(autotune, "_found", {})
    with pytest.warns(UserWarning, match="holds no launch parameters"):
        assert autotune.best(*CALL, device.run) == table()


def test_a_variant_that_does_not_fit_is_passed_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_resources = type("OutOfResources", (Exception,), {})  # as Triton's is called
    device = Device(monkeypatch, table())

    def run(how: Launch) -> None:
        if how.stages > 1:
            raise out_of_resources
        device.run(how)

    assert autotune.best(*CALL, run).stages == 1

    def broken(how: Launch) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        autotune.best(*CALL[:3], 300, broken)


def test_a_folder_that_cannot_be_written_costs_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROTOMEM_AUTOTUNE", "1")
    monkeypatch.setenv("PROTOMEM_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(autotune, "_found", {})
    with pytest.warns(UserWarning, match="were not kept"):
        assert autotune.best(*CALL, Device(monkeypatch, table()).run) == table()
