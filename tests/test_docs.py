"""What README and docs promise is tried: code runs, links lead somewhere, commands, names and messages exist."""

from __future__ import annotations

import ast
import doctest
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import protomem_kernels as pmk

ROOT = Path(__file__).parents[1]
READMES = [ROOT / folder / "README.md" for folder in (".", "csrc/cuda_host", "examples")]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        scope: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), scope)
        assert scope["loss"].isfinite()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["index.md", "extending.md"])
def test_the_examples_of_a_page_run_one_after_the_other(page: str) -> None:
    scope: dict[str, Any] = {"__name__": page}
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec", dont_inherit=True), scope)
        if "loss" in scope:
            assert scope.pop("loss").isfinite()


def test_the_sessions_of_the_concepts_are_as_shown() -> None:
    sessions = "\n".join(blocks("concepts.md", "pycon"))
    parsed = doctest.DocTestParser().get_doctest(sessions, {}, "concepts.md", None, None)
    assert len(parsed.examples) > 5
    assert doctest.DocTestRunner().run(parsed).failed == 0


def test_every_public_name_stands_in_the_api() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: protomem_kernels\.(\w+)$", pages, flags=re.MULTILINE))
    assert shown >= set(pmk.__all__)


def said_in(source: str) -> list[str]:
    """The strings of a module; "…" is what an f-string fills in."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    texts = [text for path in (ROOT / "protomem_kernels").rglob("*.py") for text in said_in(path.read_text())]
    messages = [line for block in blocks("troubleshooting.md", "text") for line in block.splitlines()]
    assert len(messages) > 25
    for message in messages:
        parts = [part for part in message.split("…") if part.strip(" :;,.")]
        pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def of_site(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_out_of_docs_becomes_what_it_is_on_the_site() -> None:
    pages = of_site("pages")
    text = "[a](../csrc/cuda_host/README.md#limits) [`x`](../setup.py) [b](../setup.py) [c](gpu.md) [d](https://e.org)"
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs" / "cuda.md"), src_uri="cuda.md"))
    config = SimpleNamespace(docs_dir=str(ROOT / "docs"), repo_url=None)
    shown = pages.on_page_markdown(f"{text}\n```\n[x](../setup.py)\n```\n", page, config, None)
    assert shown.startswith("[a](cuda_host.md#limits) `x` (`setup.py`) b (`setup.py`) [c](gpu.md) [d](https://e.org)\n")
    assert "```\n[x](../setup.py)\n```" in shown
    config.repo_url = "https://e.org/p"
    assert "[b](https://e.org/p/blob/main/setup.py)" in pages.on_page_markdown(text, page, config, None)


def test_roles_and_public_names_of_docstrings_become_links() -> None:
    rewritten = of_site("docstrings").rewritten
    shown = rewritten("See :func:`~a.f`, ``ArcFace`` and ``x``.\n\nExample:\n    >>> 1\n    1\n", "a.b", "a.b.C")
    assert '"a.b.~' not in shown
    assert '<autoref optional identifier="a.b.a.f"><code>f</code></autoref>' in shown
    assert 'identifier="protomem_kernels.ArcFace"' in shown
    assert "``x``" in shown
    assert "Examples:\n" in shown
    assert rewritten(":meth:`g`", "a.b", "a.b.C") == '<autoref optional identifier="a.b.C.g"><code>g</code></autoref>'
    assert 'identifier="a.b.ArcFace"' in rewritten("``ArcFace``", "a.b", "a.b", {"ArcFace"})
    assert rewritten("So:\n\n>>> 1\n1\n", "a", "a") == "So:\n\n```pycon\n>>> 1\n1\n```\n"
