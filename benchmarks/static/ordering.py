"""What a kernel's PTX both loads and stores, and whether a barrier of the block stands between.

Triton's scalar is loaded by every thread of the block and stored by one of them; an entry of a tile smaller than the
block is held by several threads, and goes from one layout to another through shared memory. So where one launch loads
and stores one place, a thread may load what another has stored already. No value is wrong as long as a barrier stands
on every way from the load to the store (then all have the value from before) and from the store to the load (then all
have the one after).

That is asked of every argument that a kernel both loads and stores, whatever the addresses: what is never stored cannot
change under a reader, in its own program or in another one. A load through the cache that is not coherent (``.nc``) is
reported in any case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

REGISTER = re.compile(r"%[a-z]+\d+")
PARAMETER = re.compile(r"ld\.param\.\S+\s+(.*), \[\w+_param_(\d+)")
LABEL = re.compile(r"^(\$\w+):")
JUMP = re.compile(r"^(@!?%\w+\s+)?(?:bra(?:\.uni)?\s+(\$\w+)|(ret|exit))\s*;")
BARRIER = re.compile(r"(?:bar|barrier)\.sync(?:\.aligned)?\s+0\s*;")
ADDRESS = re.compile(r"\[\s*(%[a-z]+\d+)")


class Access(NamedTuple):
    """A load or a store of global memory."""

    line: int
    argument: int
    stores: bool
    coherent: bool


def unordered(ptx: str, names: list[str]) -> list[str]:
    """Return one line for each argument that is loaded and stored with no barrier on some way between the two.

    Args:
        ptx: of one kernel.
        names: of its arguments at run time, in order; "" for what is no pointer.
    """
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    accesses = [access for access in _accesses(lines) if names[access.argument]]
    stored = {access.argument for access in accesses if access.stores}
    both = [access for access in accesses if access.argument in stored]
    after = {access.line: _without_barrier(lines, access.line) for access in both}
    found = []
    for argument in sorted(stored):
        here = [access for access in both if access.argument == argument]
        for first in here:
            for then in here:
                if first.stores != then.stores and then.line in after[first.line]:
                    words = ["is stored after it was loaded", "is loaded after it was stored"]
                    found.append(f"{names[argument]} {words[first.stores]}, with no barrier between")
        if not all(access.coherent for access in here):
            found.append(f"{names[argument]} is stored, and loaded through a cache that is not coherent")
    return sorted(set(found))


def both_ways(ttir: str) -> list[str]:
    """Return the arguments that a kernel loads as well as stores, from Triton's own code of it."""
    origins = {name: {name} for name in re.findall(r"(%\w+): !tt\.ptr<", ttir)}
    reached: dict[str, set[str]] = {"tt.load": set(), "tt.store": set()}
    for line in ttir.splitlines():
        match = re.match(r"\s*(?:(%\w+) = )?([\w.]+) (.*)", line)
        if match is None:
            continue
        target, operation, rest = match.groups()
        operands = re.findall(r"%\w+", rest)
        if operation in reached:
            reached[operation] |= origins.get(operands[0], set())
        if target:  # names come again in other regions
            pointers = {"tt.load": [], "tt.addptr": operands[:1]}.get(operation, operands)
            origins[target] = set().union(*(origins.get(operand, set()) for operand in pointers))
    return sorted(name[1:] for name in reached["tt.load"] & reached["tt.store"])


def _accesses(lines: list[str]) -> Iterator[Access]:
    """Yield the loads and stores, with the argument that their address was computed from."""
    origins = _origins(lines)
    for number, line in enumerate(lines):
        words = re.sub(r"^@!?%\w+\s+", "", line)
        loads = words.startswith(("ld.global", "ld.volatile.global")) or re.match(
            r"cp\.async\.\w+\.shared\.global", words
        )
        stores = words.startswith(("st.global", "st.volatile.global", "red.global", "atom.global"))
        if not loads and not stores:
            continue
        addresses = ADDRESS.findall(words)
        register = addresses[-1] if words.startswith("cp.async") else addresses[0]
        for argument in origins.get(register, ()):
            yield Access(number, argument, stores, ".nc" not in words.split()[0])


def _origins(lines: list[str]) -> dict[str, set[int]]:
    """Return of each register the arguments that it was computed from, memory not followed."""
    origins: dict[str, set[int]] = {}
    moves: list[tuple[list[str], list[str]]] = []
    for line in lines:
        words = re.sub(r"^@!?%\w+\s+", "", line)
        if parameter := PARAMETER.match(words):
            for register in REGISTER.findall(parameter[1]):
                origins.setdefault(register, set()).add(int(parameter[2]))
        elif words and words[0].isalpha() and not words.startswith(("ld.", "st.", "atom.", "cp.", "bra", "setp")):
            target, _, rest = words.partition(",")
            moves.append((REGISTER.findall(target), REGISTER.findall(rest)))
    changed = True
    while changed:
        changed = False
        for targets, sources in moves:
            of_sources = set().union(*(origins.get(register, set()) for register in sources))
            for register in targets:
                if not of_sources <= origins.get(register, set()):
                    origins.setdefault(register, set()).update(of_sources)
                    changed = True
    return origins


def _without_barrier(lines: list[str], start: int) -> set[int]:
    """Return the lines that can be reached from the one after ``start`` without passing a barrier."""
    places = {match[1]: number for number, line in enumerate(lines) if (match := LABEL.match(line))}
    reached: set[int] = set()
    waiting = [start + 1]
    while waiting:
        number = waiting.pop()
        if number >= len(lines) or number in reached or BARRIER.search(lines[number]):
            continue
        reached.add(number)
        jump = JUMP.match(lines[number])
        if jump and jump[2]:
            waiting.append(places[jump[2]])
        if jump is None or jump[1]:
            waiting.append(number + 1)
    return reached
