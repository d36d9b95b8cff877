"""Margins, mining rules and quality estimators by name: all that the package offers, with their parameters."""

import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels import margins, mining, quality
from protomem_kernels.training import parts
from protomem_kernels.training.config import TrainConfig, config_from, read_toml, schema
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.steps import Training
from protomem_kernels.training.unrecognizable import show_unrecognizable
from tests.training.running import assert_refused, stop_after, train

PUBLIC = {kind: set() for kind in parts.KINDS}
for name in pmk.__all__:
    room = getattr(getattr(pmk, name), "__module__", "")
    for kind, module in (("margin", margins), ("mining", mining), ("quality", quality)):
        if room == module.__name__:
            PUBLIC[kind].add(getattr(pmk, name))
EXTRA = {"softmax": "softmax:base=norm", "sphereface": "sphereface:m=1.2"}


def test_every_public_one_can_be_had():
    for kind, public in PUBLIC.items():
        assert public
        assert set(parts.named(kind).values()) == public - {pmk.LabelMargins}  # text gives no tensor and no function
        assert schema()[kind]["choices"] == ["none", *parts.named(kind)]


def training(**options):
    config = TrainConfig(
        image_size=(16, 12), width=4, embedding_dim=8, identities_per_batch=4, images_per_identity=2, steps=2, **options
    )
    return Training(config, channels=1, identities=torch.arange(4), device=torch.device("cpu"))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in PUBLIC for name in parts.choices(kind)])
def test_each_of_them_trains(kind, name):
    run = training(**{kind: EXTRA.get(name, name)})
    images, labels = torch.rand(8, 1, 16, 12), torch.arange(4).repeat(2)
    assert all(run.advance(images, labels).loss < 1e3 for _ in range(2))


def test_what_nobody_recognises_is_shown_to_who_asks():
    run = training(quality="softmax:base=recognizability,temperature=0.5")
    before = run.loss.quality.base.unrecognizable.clone()
    run.advance(torch.rand(8, 1, 16, 12), torch.arange(4).repeat(2))
    assert before.norm() == 0
    assert run.loss.quality.base.unrecognizable.norm() == pytest.approx(1)


def test_what_nobody_recognises_leaves_the_encoder_as_it_is():
    run = training(quality="recognizability")
    before = {name: value.clone() for name, value in run.encoder.train().state_dict().items()}
    show_unrecognizable(run.loss, run.encoder, torch.rand(8, 1, 16, 12), torch.Generator().manual_seed(0))
    assert run.loss.quality.unrecognizable.norm() == pytest.approx(1)
    assert all(torch.equal(before[name], value) for name, value in run.encoder.state_dict().items())


def test_parameters_reach_the_constructor():
    margin = parts.build("margin", "magface:l-a=5, u_m=0.7")
    assert margin == pmk.MagFace(l_a=5.0, u_m=0.7)
    assert parts.build("margin", "arcface:straight-through=true") == pmk.ArcFace(straight_through=True)
    nested = parts.build("quality", "softmax:temperature=0.2,base=norm,base.power=2")
    assert (nested.temperature, nested.base) == (0.2, pmk.NormQuality(2.0))
    assert parts.build("quality", "recognizability:mode=hard", embedding_dim=3).unrecognizable.shape == (3,)


def test_spellings_of_one_thing_are_one():
    assert parts.normal("margin", "arcface:m=0.50") == "arcface"
    assert parts.normal("quality", "softmax:base.power=2,base=norm") == "softmax:base=norm,base.power=2.0"
    for text in ("elasticface:std=0.1,kind=cos", "arcface:m=0.3,straight-through=true", "none"):
        assert parts.normal("margin", text) == text


def test_a_flag_and_its_toml(tiny, tmp_path):
    with tiny.open("a") as file:
        file.write('mining = "hardest-negatives:k=3"\n')
    stop_after(tmp_path, tiny, 0, "--name", "run", "--margin", "magface:u-m=.7,l-a=5")
    saved = config_from(read_toml(tmp_path / "runs" / "run" / "config.toml"), "")
    assert (saved.margin, saved.mining) == ("magface:l-a=5.0,u-m=0.7", "hardest-negatives:k=3")


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("margin", "arkface", "margin must be one of none, adaface, arcface"),
        ("margin", "arcface:size=1", "margin arcface: its parameters are m=0.5, straight-through=false; got 'size=1'"),
        ("margin", "arcface:m", "got 'm'"),
        ("margin", "arcface:m=big", "margin arcface: m must be a number, got 'big'"),
        ("margin", "arcface:m=9", "margin arcface: m is an angle in radians"),
        ("margin", "elasticface:generator=1", "its parameters are m=0.5, std=0.05, kind=arc; got 'generator=1'"),
        ("mining", "hardest-negatives:k=1.5", "k must be a whole number, got '1.5'"),
        ("mining", "none:k=1", "its parameters are none"),
        ("quality", "softmax", "needs another one as its base, as in softmax:base=NAME, one of center, norm"),
        ("quality", "softmax:base=best", "quality must be one of none, center, norm"),
        ("quality", "norm:power.of=2", "got 'power.of=2'"),
    ],
)
def test_what_cannot_be_had(kind, text, expected):
    with pytest.raises(RunError) as refused:
        parts.normal(kind, text)
    assert expected in str(refused.value)


def test_a_bad_one_leaves_no_run(tiny, tmp_path):
    assert_refused(train(tiny, "--margin", "magface:l-a=200"), "margin magface: u_a")
    assert not (tmp_path / "runs").exists()
