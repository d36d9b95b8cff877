"""Tables of Hugging Face's ``datasets``: a folder that ``save_to_disk`` wrote, or Parquet files with encoded images."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from protomem_kernels.data.errors import DatasetError

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("identity", "label", "id", "person", "class", "cls")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk writes
SPLIT = "train"  # of several


class Table:
    """The images of a table, a row each.

    Args:
        path: the folder, or a Parquet file.
        image_column: the column of encoded images; empty: the one that ``datasets`` knows as images, else one of
            ``IMAGE_COLUMNS``.
        label_column: the column of identities; empty: the one that ``datasets`` knows as classes, else one of
            ``LABEL_COLUMNS``.

    Attributes:
        whose: the name of each row's identity.

    Raises:
        DatasetError: ``datasets`` is not installed, the table cannot be read, or has no such columns.

    """

    def __init__(self, path: Path, image_column: str = "", label_column: str = "") -> None:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise DatasetError(
                f"{path}: expected the library datasets to read it, got {error}: "
                "pip install 'protomem-kernels[datasets]'"
            ) from error
        self.path = path
        table = self._opened(datasets)
        image, label = datasets.Image, datasets.ClassLabel
        self._image = self._column(table, image_column, IMAGE_COLUMNS, image, "image_column")
        column = self._column(table, label_column, LABEL_COLUMNS, label, "label_column")
        classes = table.features[column]
        names = classes.names if isinstance(classes, label) else None
        labels = table[column]
        self.whose = [str(value) if names is None else names[value] for value in labels]
        self._rows = table.select_columns([self._image])
        if isinstance(table.features[self._image], image):
            self._rows = self._rows.cast_column(self._image, image(decode=False))

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def name_of(self, place: int) -> str:
        """Return what an image is called: the table and its row."""
        return f"{self.path.name}/{place}"

    def read(self, place: int) -> bytes:
        """Return one encoded image."""
        value = self._rows[place][self._image]
        if isinstance(value, dict):
            value = value["bytes"] or Path(value["path"]).read_bytes()
        if not isinstance(value, bytes):
            raise TypeError(f"a {type(value).__name__} in the column {self._image}")
        return value

    def _opened(self, datasets: Any) -> Any:
        try:
            if self.path.is_dir():
                table = datasets.load_from_disk(str(self.path))
            else:
                table = datasets.Dataset.from_parquet(str(self.path))
        except Exception as error:  # of half a dozen libraries below
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DatasetError(f"{self.path}: expected a table of the library datasets, got {reason}") from error
        if isinstance(table, datasets.DatasetDict):
            if SPLIT not in table:
                raise DatasetError(
                    f"{self.path}: expected a split {SPLIT!r}, got {', '.join(table)}; name the folder of one"
                )
            table = table[SPLIT]
        return table

    def _column(self, table: Any, asked: str, usual: tuple[str, ...], kind: type, option: str) -> str:
        columns = table.column_names
        if asked:
            found = [asked] if asked in columns else []
        else:
            found = [name for name, feature in table.features.items() if isinstance(feature, kind)]
            found = found or [name for name in usual if name in columns]
        if not found:
            expected = asked or f"one of {', '.join(usual)}"
            raise DatasetError(
                f"{self.path}: expected the {option} {expected}, got the columns {', '.join(columns)} "
                f"(--{option.replace('_', '-')})"
            )
        return found[0]
