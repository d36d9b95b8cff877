"""The pictures of a run."""

import pytest
import torch
from PIL import Image

from protomem_kernels.training import pictures as pictures_module


@pytest.mark.parametrize(("accepts", "rejects", "channels"), [(5, 0, 1), (0, 8, 3), (1, 1, 3)])
def test_a_contact_sheet_of_any_number_of_pairs(tmp_path, accepts, rejects, channels):
    image = torch.randint(256, (channels, 20, 15), dtype=torch.uint8)
    pair = pictures_module.Pair(image, image.flip(2), ("a/1", "b/2"), 0.5)
    pictures_module.draw_pairs(tmp_path / "pairs.png", [pair] * accepts, [pair] * rejects, "a test")
    with Image.open(tmp_path / "pairs.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"
