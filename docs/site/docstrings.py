"""Docstrings as they are written in this package, made into what mkdocstrings renders.

- ``:func:`name``` and its kin, and the public names in double backquotes, become links to where they are documented;
  what has no place on the site stays code.
- ``docs/page.md`` becomes a link to that page.
- "Example:" is the section that Google's style calls "Examples:"; prompts outside one become a block of code.
- "Shapes:", which that style does not know, is a paragraph. Papers on arXiv are linked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any

from griffe import Alias, Extension, Object

PACKAGE = Path(__file__).parents[2] / "protomem_kernels"
ROLE = re.compile(r":(?:func|class|meth|mod|data):`(?P<tilde>~?)(?P<name>[\w.]+)`")
NAMED = re.compile(r"``(?P<name>[A-Za-z_]\w*)``")
PAGE = re.compile(r"(?<![\w/])docs/(?P<page>[\w/]+)\.md")
ARXIV = re.compile(r"(?<=arXiv )(\d{4}\.\d{5})(?: and (\d{4}\.\d{5}))?")
SHAPES = re.compile(r"^Shapes:\n((?:[ ]+\S.*\n?)+)", re.MULTILINE)
PROMPTS = re.compile(r"(?:^[ ]*>>> .*\n(?:^[ ]*\S.*\n?)*)", re.MULTILINE)


@cache
def public_names() -> frozenset[str]:
    """Return what ``protomem_kernels`` calls public."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return frozenset(ast.literal_eval(node.value))
    raise ValueError("protomem_kernels has no __all__")


def link(identifier: str, shown: str) -> str:
    """Return a link to an object's place on the site, or plain code if it has none."""
    return f'<autoref optional identifier="{identifier}"><code>{shown}</code></autoref>'


def rewritten(text: str, module: str, holder: str, own: Container[str] = ()) -> str:
    """Return a docstring in mkdocstrings' terms.

    Args:
        text: the docstring.
        module: in which it stands.
        holder: the class in it, or the module itself.
        own: the names that the module defines; they go before public ones.
    """

    def role(found: re.Match[str]) -> str:
        name = found["name"]
        shown = name.rsplit(".", 1)[-1] if found["tilde"] else name
        if name.startswith("protomem_kernels."):
            return link(name, shown)
        return link(f"{holder if found[0].startswith(':meth:') else module}.{name}", shown)

    def named(found: re.Match[str]) -> str:
        name = found["name"]
        if name in own:
            return link(f"{module}.{name}", name)
        return link(f"protomem_kernels.{name}", name) if name in public_names() else found[0]

    text = ROLE.sub(role, text)
    text = NAMED.sub(named, text)
    text = PAGE.sub(r"[docs/\g<page>.md](../\g<page>.md)", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = ARXIV.sub(lambda found: " and ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in found.groups() if n), text)
    text = SHAPES.sub(lambda found: f"**Shapes:** {dedent(found[1])}", text)
    if re.search(r"^Examples?:$", text, re.MULTILINE):
        return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return PROMPTS.sub(lambda block: f"```pycon\n{block[0].rstrip()}\n```\n", text)


class Docstrings(Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: Object | Alias, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is None:
            return
        holder = obj if obj.is_class or obj.is_module or obj.parent is None else obj.parent
        members = obj.module.members.items()
        own = {name for name, member in members if not member.is_alias and (member.is_class or member.is_function)}
        obj.docstring.value = rewritten(obj.docstring.value, obj.module.path, holder.path, own)
