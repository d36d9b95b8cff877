"""Lists of pairs of images to verify, one pair a line of a text file.

    ann/1.jpg   ann/2.jpg   1          the same identity: 1, true, same; another: 0, false, different
    ann/1.jpg   bob/1.jpg   different
    ann         1   4                  as LFW's pairs.txt has it: ann/ann_0001 and ann/ann_0004 are the same,
    ann         1   bob     3          ann/ann_0001 and bob/bob_0003 are not

An image is called what its data set calls it, a folder's by its path in there; LFW's by whatever suffix it has. Names
that hold blanks are separated by commas or tabs. Empty lines, lines that begin with # and a header are passed over.
"""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.images import ImageDataset, image_name
from protomem_kernels.data.left_out import LeftOut
from protomem_kernels.data.pairs import Pairs

ANSWERS = {"1": True, "true": True, "same": True, "0": False, "false": False, "different": False}
ABSENT = "pairs with an image that is not among those that verify"
EXPECTED = "expected two images and 1 or 0, separated by tabs, commas or blanks, or a line of LFW's pairs.txt"


class _Line(NamedTuple):
    first: str
    second: str
    same: bool


def read_pairs(path: str | os.PathLike[str], dataset: ImageDataset) -> tuple[Pairs, LeftOut]:
    r"""Read a list of pairs among the images of a data set.

    Args:
        path: the text file, UTF-8.
        dataset: the images; its labels are held to the answers.

    Returns:
        the pairs as positions in ``dataset``, in the order of the file, and what of it is left out: the pairs that name
        an image that is not in ``dataset``.

    Raises:
        DatasetError: the file cannot be read, a line is none of the above or says what the labels deny, an image stands
            beside itself, fewer than two pairs of a kind are left.

    Example:
        >>> import tempfile
        >>> from protomem_kernels.data.images import orl_faces
        >>> file = Path(tempfile.mkdtemp(), "pairs.txt")
        >>> lines = ["s1/1.pgm s1/2.pgm 1", "s1/1.pgm s2/1.pgm 0", "s3/1.pgm s3/2.pgm 1", "s3/1.pgm s2/1.pgm 0"]
        >>> _ = file.write_text("\n".join(lines))
        >>> pairs, left_out = read_pairs(file, orl_faces())
        >>> pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), len(left_out)
        ([0, 0, 20, 20], [1, 10, 21, 10], [True, False, True, False], 0)

    """
    path = Path(path)
    places = {image_name(image): place for place, image in enumerate(dataset.paths)}
    for name, place in list(places.items()):
        places.setdefault(posixpath.splitext(name)[0], place)  # LFW's, without a suffix
    first, second, same, left_out = list[int](), list[int](), list[bool](), LeftOut()
    for number, line in _lines(path):
        one, other = (_place(name, places) for name in line[:2])
        if one is None or other is None:
            left_out.add(ABSENT, f"line {number}: {line.first if one is None else line.second}")
            continue
        if one == other:
            raise DatasetError(f"{path}, line {number}: expected two images, got {line.first} beside itself")
        names = [dataset.names[int(dataset.labels[place])] for place in (one, other)]
        if line.same != (names[0] == names[1]):
            answer = f"the same for {names[0]} and {names[1]}" if line.same else f"different for {names[0]} twice"
            raise DatasetError(f"{path}, line {number}: expected what the data say of their identities, got {answer}")
        first.append(one)
        second.append(other)
        same.append(line.same)
    pairs = Pairs(np.array(first, np.int64), np.array(second, np.int64), np.array(same, np.bool_))
    check_enough(pairs, str(path), left_out)
    return pairs, left_out


def check_enough(pairs: Pairs, origin: str, left_out: LeftOut) -> None:
    """Raise DatasetError unless there are two pairs of each kind, of which figures can be made."""
    genuine, impostors = int(pairs.same.sum()), int((~pairs.same).sum())
    if min(genuine, impostors) < 2:
        raise DatasetError(
            f"{origin}: expected at least two pairs of one identity and two of different ones, got {genuine} and "
            f"{impostors}" + "".join(f"; {line}" for line in left_out.lines())
        )


def _place(name: str, places: Mapping[str, int]) -> int | None:
    return places.get(name, places.get(posixpath.normpath(name)))


def _lines(path: Path) -> Iterator[tuple[int, _Line]]:
    """Yield what each line says, with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DatasetError(f"{path}: expected a readable list of pairs, got {error.strerror or error}") from error
    header = True  # may come
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not (header and _is_header(line)):
            found = _of_lfw(line.split()) or _of_three(line)
            if found is None:
                raise DatasetError(f"{path}, line {number}: {EXPECTED}, got {line!r:.80}")
            yield number, found
        header = False


def _is_header(line: str) -> bool:
    """Tell names of columns, and the numbers of folds and pairs that LFW's list begins with, from a pair."""
    fields = line.replace(",", " ").split()
    numbers = all(field.isdecimal() for field in fields)
    return (numbers and len(fields) < 3) or (fields[-1].isidentifier() and "/" not in line and "." not in line)


def _of_lfw(fields: Sequence[str]) -> _Line | None:
    if len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal() and "/" not in fields[0]:
        return _Line(_lfw_name(fields[0], fields[1]), _lfw_name(fields[0], fields[2]), True)
    if (
        len(fields) == 4
        and fields[1].isdecimal()
        and fields[3].isdecimal()
        and not any("/" in field for field in fields)
    ):
        return _Line(_lfw_name(fields[0], fields[1]), _lfw_name(fields[2], fields[3]), False)
    return None


def _lfw_name(person: str, number: str) -> str:
    return f"{person}/{person}_{int(number):04d}"


def _of_three(line: str) -> _Line | None:
    """Cut a line at what cuts it into three."""
    for fields in (*(next(csv.reader([line], delimiter=mark)) for mark in "\t,"), line.split()):
        if len(fields) == 3:
            first, second, answer = (field.strip() for field in fields)
            if first and second and answer.lower() in ANSWERS:
                return _Line(first, second, ANSWERS[answer.lower()])
    return None
