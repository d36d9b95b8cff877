"""Glyphs drawn in fonts whose faults are known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from protomem_kernels.data import hangul_fonts
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.glyphs import _chosen, glyph_images
from protomem_kernels.data.hangul_drawing import draw
from tests.data.fonts import make_font

CHOSEN = _chosen(40).tolist()


@pytest.fixture(scope="module")
def fonts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fonts")
    make_font(folder / "a.ttf", CHOSEN)
    make_font(folder / "deep" / "b.TTF", CHOSEN, square=60)
    make_font(folder / "c.ttf", CHOSEN, square=90, missing=CHOSEN[3:6], blank=CHOSEN[7:9], like_the_first=CHOSEN[10:14])
    make_font(folder / "d.ttf", CHOSEN, square=70, missing=CHOSEN[19:])
    make_font(folder / "e.ttf", CHOSEN, ascent=930)
    (folder / "f.ttf").write_bytes((folder / "a.ttf").read_bytes())
    (folder / "g.ttf").write_bytes(b"no font")
    (folder / "readme.txt").write_text("no font either")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def glyphs(fonts, cache):
    return glyph_images(fonts, syllables=40, cache=cache)


def test_what_shows_its_syllable_is_kept_and_all_else_counted(glyphs):
    assert [str(line).replace("\n", " ") for line in glyphs.tally] == [
        "a.ttf: 40 kept",
        "b.TTF: 40 kept",
        "c.ttf: 30 kept, 2 blank, 3 without a glyph, 5 like another",
        "d.ttf: 19 kept, 21 without a glyph; left out, shows only 48% of the syllables",
        "e.ttf: 40 kept; left out, looks like a.ttf",
        "f.ttf: 0 kept; left out, the same file as a.ttf",
        "g.ttf: 0 kept; left out, no font: unknown file format",
    ]
    assert glyphs.fonts == ["a.ttf", "b.TTF", "c.ttf"]
    wrong = {0, 3, 4, 5, 7, 8, 10, 11, 12, 13}
    right = [place for index, place in enumerate(CHOSEN) if index not in wrong]
    assert glyphs.labels.tolist() == CHOSEN + CHOSEN + right
    assert glyphs.styles.tolist() == [0] * 40 + [1] * 40 + [2] * 30
    assert repr(glyphs) == "GlyphSet(110 images of 40 syllables in 3 fonts)"
    assert len(glyphs.names) == 11172
    assert (glyphs.names[0], glyphs.names[-1]) == ("가", "힣")


def test_the_ink_fills_the_image_but_for_a_margin(glyphs):
    assert glyphs.images.shape == (110, 1, 32, 32)
    assert glyphs.images.dtype == torch.uint8
    for style in range(3):
        ink = glyphs.images[glyphs.styles == style, 0].amax(0)
        rows, columns = ink.amax(1).nonzero().flatten(), ink.amax(0).nonzero().flatten()
        for places in (rows, columns):
            assert 0 <= places[0] <= 2
            assert 29 <= places[-1] <= 31


def test_a_picture_is_the_font_s_squares(glyphs):
    """The board of a.ttf, 870 units wide, is 30 pixels: every square's middle is ink, every other place's is not."""
    scale = 30 / 870
    for index in range(40):
        squares = np.random.default_rng(CHOSEN[index]).random((6, 6)) < 0.4
        places = (1 + scale * (np.arange(6) * 150 + 60)).astype(int)
        found = glyphs.images[index, 0].numpy()[np.ix_(31 - places, places)] > 127
        assert (found == squares).all()


def test_where_a_glyph_stands_follows_from_its_ink_alone(tmp_path):
    fonts = [make_font(tmp_path / f"{ascent}.ttf", CHOSEN, ascent=ascent) for ascent in (1000, 985, 930, 1400)]
    images = [draw(font, _chosen(40), 32).images for font in fonts]
    assert all((images[0] == other).all() for other in images[1:])


def test_the_file_is_mapped_the_second_time_and_written_to_by_nobody(fonts, cache, glyphs):
    (file,) = cache.iterdir()
    before = file.read_bytes(), file.stat().st_mtime_ns
    again = glyph_images(fonts, syllables=40, cache=cache, progress=lambda *_: pytest.fail("it is drawn again"))
    assert torch.equal(again.images, glyphs.images)
    assert torch.equal(again.labels, glyphs.labels)
    assert torch.equal(again.styles, glyphs.styles)
    assert (again.tally, again.fonts, again.notes) == (glyphs.tally, glyphs.fonts, [])
    again.images.fill_(7)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_other_fonts_are_drawn_again_and_a_line_says_so(fonts, tmp_path):
    folder, cache = tmp_path / "fonts", tmp_path / "cache"
    make_font(folder / "a.ttf", CHOSEN)
    first = glyph_images(folder, syllables=40, cache=cache)
    make_font(folder / "b.ttf", CHOSEN, square=60)
    done = []
    second = glyph_images(folder, syllables=40, cache=cache, progress=lambda *step: done.append(step))
    assert (len(first), len(second), first.notes) == (40, 80, [])
    assert done == [(0, 2), (1, 2), (2, 2)]
    (file,) = cache.iterdir()
    assert second.notes == [
        f"{file}: expected images that were kept, got others (different fonts); they are made again"
    ]


def test_a_smaller_set_is_a_part_of_a_larger_one():
    few, more = set(_chosen(100).tolist()), set(_chosen(1000).tolist())
    assert (len(few), len(more)) == (100, 1000)
    assert few < more
    assert _chosen(None).tolist() == list(range(11172))


def test_an_interrupted_call_leaves_no_file(fonts, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        glyph_images(fonts, syllables=40, cache=tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


class TestBadInput:
    def test_missing_packages_are_named_in_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(hangul_fonts, "ROOTS", (str(tmp_path),))
        for name in ("nanum/NanumGothic.ttf", "unfonts-core/UnBatang.ttf"):
            make_font(tmp_path / "truetype" / name, CHOSEN[:2])
        with pytest.raises(DatasetError) as error:
            glyph_images(syllables=40, cache=tmp_path / "cache")
        assert str(error.value) == (
            f"{tmp_path}: expected the Hangul fonts of five packages, got 3 missing: apt-get install fonts-nanum-extra "
            "fonts-baekmuk fonts-unfonts-extra (or name a folder of fonts)"
        )
        for name in ("nanum/NanumPen.ttf", "baekmuk/batang.ttf", "unfonts-extra/UnPen.ttf", "other/Other.ttf"):
            make_font(tmp_path / "truetype" / name, CHOSEN[:2])
        found = [path.name for path in hangul_fonts.installed_fonts()]
        assert found == ["NanumGothic.ttf", "NanumPen.ttf", "UnBatang.ttf", "UnPen.ttf", "batang.ttf"]

    def test_fonts_without_hangul(self, tmp_path):
        make_font(tmp_path / "latin.ttf", CHOSEN, missing=CHOSEN)
        expected = r"expected fonts that show Hangul syllables, got 1 that do not: latin\.ttf"
        with pytest.raises(DatasetError, match=expected):
            glyph_images(tmp_path, syllables=40, cache=tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, fonts, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DatasetError, match=r"file/hangul.*: expected to write images there, got: File exists"):
            glyph_images(fonts, syllables=40, cache=tmp_path / "file")

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"size": 7}, ValueError, "size must be at least 8, got 7"),
            ({"size": 32.0}, TypeError, "size must be an int, got float"),
            ({"syllables": 1}, ValueError, "syllables must be at least 2, got 1"),
            ({"syllables": 11173}, ValueError, "syllables must be at most 11172, got 11173"),
            ({"syllables": "40"}, TypeError, "syllables must be an int, got str"),
        ],
    )
    def test_numbers(self, fonts, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            glyph_images(fonts, cache=tmp_path, **options)
