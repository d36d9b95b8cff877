"""Labels, slots and identities in whatever form: taken where the meaning is clear, else refused with the way out."""

import numpy as np
import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels.identities import find_slots

E = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([2, 0, 1, 0])


class Series:
    """What counts of a pandas Series whose index is not 0, 1, 2 ...: it gives its items by that."""

    def __getitem__(self, index):
        return int(Y.flip(0)[index])

    def __len__(self):
        return 4

    def to_numpy(self):
        return Y.numpy()


FORMS = {
    "int32": Y.int(),
    "int16": Y.short(),
    "uint8": Y.byte(),
    "uint32": Y.to(torch.uint32),
    "uint64": Y.to(torch.uint64),
    "list": Y.tolist(),
    "tuple": tuple(Y.tolist()),
    "list of numpy": list(Y.numpy()),
    "numpy": Y.numpy(),
    "numpy uint64": Y.numpy().astype(np.uint64),
    "numpy backwards": Y.flip(0).numpy()[::-1],
    "numpy objects": np.array(Y.tolist(), dtype=object),
    "big endian": Y.numpy().astype(">i8"),
    "series": Series(),
}


def full_memory():
    memory = pmk.PrototypeMemory(4, 3)
    memory.update(E[:3], torch.arange(3))
    return memory


def state_after(labels):
    memory = pmk.PrototypeMemory(4, 3)
    return [memory.update(E, labels), *memory.state]


def loss_of(labels, **options):
    return pmk.PrototypeMemoryLoss(3, 4, **options)(E, labels)


# Whatever takes labels, slots or identities -> the argument's name, and a call.
ENTRIES = {
    "PrototypeMemory.update": ("labels", state_after),
    "PrototypeMemory.lookup": ("labels", lambda y: full_memory().lookup(y)),
    "PrototypeMemory.doppelgangers": ("labels", lambda y: full_memory().doppelgangers(y, 1)),
    "PrototypeMemoryLoss": ("labels", lambda y: loss_of(y)),
    "with quality": ("labels", lambda y: loss_of(y, quality=pmk.SoftmaxQuality(pmk.CenterQuality()))),
    "with fresh gradients": ("labels", lambda y: loss_of(y, prototype_gradient="fresh")),
    "in eval": ("labels", lambda y: pmk.PrototypeMemoryLoss(3, 4).eval()(E, y, return_stats=True)),
    "MarginSoftmaxLoss": ("targets", lambda y: _seeded(lambda: pmk.MarginSoftmaxLoss(5, 3)(E, y))),
    "margin_softmax_loss": ("targets", lambda y: pmk.margin_softmax_loss(E, torch.eye(3), y)),
    "margin_softmax_logits": ("targets", lambda y: pmk.margin_softmax_logits(E, torch.eye(3), y)),
    "hardest_negatives": ("targets", lambda y: pmk.hardest_negatives(E, torch.eye(3), y, k=2)),
    "aggregate_prototypes": ("labels", lambda y: pmk.aggregate_prototypes(E, y)),
    "enqueue_": ("identities", lambda y: pmk.enqueue_(pmk.MemoryState.empty(4, 3), E, y)),
    "find_slots": ("identities", lambda y: find_slots(torch.arange(3), y)),
    "NormQuality": ("labels", lambda y: pmk.NormQuality()(E, y)),
    "CenterQuality": ("labels", lambda y: pmk.CenterQuality()(E, y)),
    "RecognizabilityQuality": ("labels", lambda y: pmk.RecognizabilityQuality(3)(E, y)),
}


def _seeded(call):
    torch.manual_seed(0)
    return call()


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_form_gives_what_the_tensor_gives(entry):
    _, call = ENTRIES[entry]
    expected = call(Y)
    for form, labels in FORMS.items():
        torch.testing.assert_close(
            call(labels), expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, f=form: f"{f}: {m}"
        )


# What is no label, the error, and what it says after the argument's name.
REFUSED = [
    (Y.float(), TypeError, r"must be int64 or int32, got torch.float32; {name}.long\(\) makes it so"),
    (Y.bool(), TypeError, r"must be int64 or int32, got torch.bool; {name}.long\(\) makes it so"),
    (Y.double().numpy(), TypeError, r"must be int64 or int32, got torch.float64; {name}.long\(\) makes it so"),
    (Y[:, None], ValueError, r"must have shape \([BP],\), got \(4, 1\); {name}.squeeze\(1\) makes it so"),
    (Y.numpy()[:, None], ValueError, r"must have shape \([BP],\), got \(4, 1\); {name}.squeeze\(1\) makes it so"),
    (
        ["a", "b", "a", "b"],
        TypeError,
        r"must be integers of shape .*, got 'a' \(str\) at index 0; number them: numpy",
    ),
    (
        np.array(list("abab")),
        TypeError,
        r"must be integers of shape .*, got <U1; number them: numpy.unique\({name}",
    ),
    ("abab", TypeError, "must be a tensor of shape .*, or integers that make one, got str"),
    (3, TypeError, "must be a tensor of shape .*, or integers that make one, got int"),
    ({0, 1, 2, 3}, TypeError, "must be a tensor of shape .*, or integers that make one, got set"),
    ([0, 1, None, 2], TypeError, r"must be integers of shape .*, got None \(NoneType\) at index 2"),
    (
        [2**63 + 1, 0, 1, 2],
        ValueError,
        r"must be below 2\*\*63 to be int64, got 9223372036854775809; of 64-bit hashes drop",
    ),
    ([2**64, 0, 1, 2], ValueError, "must be integers of at most 64 bits, got 18446744073709551616 at index 0"),
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_label_is_refused_by_name_with_the_call_that_mends_it(entry):
    name, call = ENTRIES[entry]
    for labels, error, message in REFUSED:
        with pytest.raises(error, match=f"^{name} {message.format(name=name)}"):
            call(labels)


def test_a_refused_call_leaves_the_memory_alone():
    loss_fn = pmk.PrototypeMemoryLoss(3, 4)
    loss_fn(E, Y)
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    with pytest.raises(TypeError, match="labels"):
        loss_fn(E, Y.float())
    with pytest.raises(ValueError, match="labels"):
        loss_fn(E, [2**63, 0, 1, 2])
    torch.testing.assert_close(dict(loss_fn.state_dict()), before, rtol=0, atol=0)
