"""Small data sets in other people's formats, written here by what the formats' own documents say."""

import io
import pickle
import struct
import tarfile

from PIL import Image

MAGIC = struct.pack("<I", 0xCED7230A)


def png(person, image):
    """An image that tells whose it is and which: the first pixel is (person, image, 0)."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (person, image, 0)).save(file, "PNG")
    return file.getvalue()


def record(content, cut_at_magic=True):
    """One record of RecordIO: content is cut where it holds the magic number, at multiples of 4."""
    parts, start = [], 0
    if cut_at_magic:
        for place in range(0, len(content) - 3, 4):
            if content[place : place + 4] == MAGIC:
                parts.append(content[start:place])
                start = place + 4
    parts.append(content[start:])
    written = b""
    for number, part in enumerate(parts):
        flag = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        written += MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4)
    return written


def header(*labels):
    """The header of an image record: one label within it, or several behind it."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], 0, 0)
    return struct.pack("<IfQQ", len(labels), 0.0, 0, 0) + struct.pack(f"<{len(labels)}f", *labels)


def write_rec(path, people, *, with_header=True, image=png):
    """Write ``people``, a number of images each, to path and its .idx; with insightface's header or without."""
    images = [(person, number) for person, count in enumerate(people) for number in range(count)]
    records = {key: record(header(person) + image(person, n)) for key, (person, n) in enumerate(images, 1)}
    if with_header:
        first, end = len(images) + 1, len(images) + 1 + len(people)
        records[0] = record(header(first, end))
        start = 1
        for person, count in enumerate(people):
            records[first + person] = record(header(start, start + count))
            start += count
    index, content = "", b""
    for key in sorted(records):
        index += f"{key}\t{len(content)}\n"
        content += records[key]
    path.write_bytes(content)
    path.with_suffix(".idx").write_text(index)


def write_tar(path, members):
    """Write a mapping of names to bytes."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_bin(path, images, same, protocol=4):
    path.write_bytes(pickle.dumps((images, same), protocol))
