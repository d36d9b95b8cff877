"""The pictures of a run."""

import pytest
import torch
from PIL import Image

from protomem_kernels.training import lettering as lettering_module
from protomem_kernels.training import pictures as pictures_module


@pytest.mark.parametrize(("accepts", "rejects", "channels"), [(5, 0, 1), (0, 8, 3), (1, 1, 3)])
def test_a_contact_sheet_of_any_number_of_pairs(tmp_path, accepts, rejects, channels):
    image = torch.randint(256, (channels, 20, 15), dtype=torch.uint8)
    pair = pictures_module.Pair(image, image.flip(2), ("a/1", "b/2"), 0.5)
    pictures_module.draw_pairs(tmp_path / "pairs.png", [pair] * accepts, [pair] * rejects, "a test")
    with Image.open(tmp_path / "pairs.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"


NAMES = ["a$b_c", "x_y_$z", "w_v$$", "u$er{1} ^", "[b]", "zcaf\udce9/1", "甲乙", "tab\t", "ü"]


@pytest.mark.filterwarnings("error")  # "Glyph missing" is a warning
def test_names_of_any_kind_are_drawn(tmp_path, caplog):
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    pairs = [pictures_module.Pair(image, image, (name, name), 0.5) for name in NAMES]
    for name in NAMES:
        curve = pictures_module.Curve("Prototype Memory", [0, 1], [0, 1], 0.5, 0.5)
        pictures_module.draw_roc(tmp_path / "roc.png", curve, subtitle=name)
    pictures_module.draw_pairs(tmp_path / "pairs.png", pairs, pairs, NAMES[0])
    assert not caplog.messages  # of the weights of fonts


def test_letters_come_from_a_font_that_has_them_or_are_spelled(monkeypatch):
    plain, other = "DejaVu Sans", "DejaVu Serif"

    def letters(family):
        return {ord(letter) for letter in {plain: "a$", other: "a人"}.get(family, "")}

    monkeypatch.setattr(lettering_module, "_letters", letters)
    found = lettering_module.lettering(["a$a", "人脸"])
    assert found.families == [plain, other]
    assert found.missing == {"脸"}
    assert found.spell("a 人脸") == "a 人\\u8138"
    assert found.spell("caf\udce9\x07\n") == "caf\\xe9\\x07\n"
    assert lettering_module.lettering(["a"]).families == [plain]
