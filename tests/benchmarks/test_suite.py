"""The benchmark suite compares like with like: peers agree where they compute the same thing, data is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk
from benchmarks import inputs, memory, peers
from benchmarks.inputs import REGIMES, Problem, Size, at_cosine, labels_in_pairs, problem
from benchmarks.peers import PEERS, SCALE, WHATS, Peer
from benchmarks.ratio import Ratio, neighbours_ratios

SIZE = Size(16, 300, 8)
COMPILED = ("torch.compile", "cut-cross-entropy")
ELSEWHERE = ("protomem-cuda", "protomem-triton")
QUICK = [name for name in PEERS if name not in COMPILED + ELSEWHERE]


def served(name: str) -> Peer:
    if refusal := PEERS[name].refusal(SIZE):
        pytest.skip(f"{name}: {refusal}")
    return PEERS[name]


def results(peer: Peer, data: Problem) -> list[Tensor]:
    loss, of_embeddings, of_prototypes = peer.step(data, WHATS[-1])()
    return [loss, of_embeddings, of_prototypes.T if peer.transposed else of_prototypes]


def truth(data: Problem, has_margin: bool) -> list[Tensor]:
    """The loss and both gradients in float64, from the definition."""
    x, w = (tensor.double().requires_grad_() for tensor in data[:2])
    logits = functional.normalize(x) @ w.T
    if has_margin:
        target = logits.gather(1, data.targets[:, None])
        logits = logits.scatter(1, data.targets[:, None], pmk.ArcFace(0.5)(target, torch.ones_like(target)))
    loss = functional.cross_entropy(SCALE * logits, data.targets)
    return [loss.detach(), *torch.autograd.grad(loss, [x, w])]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", QUICK)
def test_peers_compute_the_same_loss_and_gradients(name: str, regime: str) -> None:
    peer, data = served(name), problem(SIZE, regime)
    loss, of_embeddings, of_prototypes = results(peer, data)
    expected = truth(data, peer.has_margin)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_embeddings.double(), expected[1], rtol=1e-3, atol=1e-4)
    # Some normalise the prototypes in the loss: then what lies along a unit row passes no gradient.
    aside = [g - (g * data.prototypes).sum(dim=1, keepdim=True) * data.prototypes for g in (of_prototypes, expected[2])]
    torch.testing.assert_close(aside[0].double(), aside[1].double(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_peers_compute_the_same_loss(name: str) -> None:
    peer, data = served(name), problem(SIZE, "trained")
    torch.compiler.reset()
    loss, _ = peer.step(data, WHATS[1])()
    torch.testing.assert_close(loss.double(), truth(data, peer.has_margin)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "partial-fc", "pytorch-metric-learning", "protomem-reference"])
def test_peers_agree_where_the_margin_passes_pi(name: str) -> None:
    data = problem(SIZE)
    data = data._replace(embeddings=-at_cosine(0.95, data.prototypes[data.targets], seed=5))
    torch.testing.assert_close(served(name).step(data, WHATS[0])()[0].double(), truth(data, True)[0], rtol=1e-4, atol=0)


def test_eager_logits_and_hardest_negatives_are_ours() -> None:
    x, w, targets = problem(SIZE, "trained")
    torch.testing.assert_close(
        peers.eager_logits(x, w, targets), pmk.margin_softmax_logits(x, w, targets), rtol=1e-5, atol=1e-4
    )
    values, slots = peers.eager_hardest(x, w, targets, 7)
    ours = pmk.hardest_negatives(x, w, targets, k=7)
    torch.testing.assert_close(values, ours.cosines)
    assert torch.equal(slots, ours.slots)


def test_eager_aggregate_is_ours() -> None:
    x, labels = problem(SIZE).embeddings, labels_in_pairs(16, 1000, seed=3)
    short = peers.eager_aggregate_without_rules(x, labels)
    torch.testing.assert_close(short, pmk.aggregate_prototypes(x, labels).prototypes)
    labels[3] = -1
    labels[[4, 5, 6]] = torch.tensor([2000, 2000, 2001])
    x[4], x[6, 0] = -x[5], float("nan")  # antipodal, and broken
    for theirs, ours in zip(peers.eager_aggregate(x, labels), pmk.aggregate_prototypes(x, labels), strict=True):
        torch.testing.assert_close(theirs, ours)


def test_eager_enqueue_is_ours_call_after_call() -> None:
    M, P = 100, 10
    w = problem(SIZE).prototypes[:M]
    theirs, ours = inputs.full_memory(w), inputs.full_memory(w)
    for call, identities in enumerate(
        inputs.identities_half_known(M, P)[:30]
    ):  # past the end of the ring and round again
        rows = problem(Size(P, P, 8)).prototypes.roll(call, 0)
        slots, evicted = peers.eager_enqueue_(theirs, rows, identities)
        result = pmk.enqueue_(ours, rows, identities)
        assert torch.equal(slots, result.slots)
        assert torch.equal(evicted, result.evicted)
    for field, a, b in zip(theirs._fields, theirs, ours, strict=True):
        torch.testing.assert_close(a, b, msg=field)


def test_the_enqueue_batches_are_half_known_and_stay_so() -> None:
    M, P = 10_000, 256
    state = inputs.full_memory(torch.eye(1).expand(M, 1))
    for identities in inputs.identities_half_known(M, P):
        assert torch.isin(identities, state.identities).sum() == P // 2
        pmk.enqueue_(state, torch.ones(P, 1), identities)


def test_regimes_are_what_they_say() -> None:
    size = Size(64, 20_000, 128)
    for regime in REGIMES:
        x, w, targets = problem(size, regime)
        cosine = functional.normalize(x) @ w.T
        of_target = cosine.gather(1, targets[:, None])
        negatives = cosine.scatter(1, targets[:, None], -1)
        assert torch.allclose(w.norm(dim=1), torch.ones(size.M), atol=1e-5)
        if regime == "fresh":
            assert of_target.abs().max() < 0.5
            assert negatives.max() < 0.6
            continue
        assert torch.allclose(of_target, torch.full((size.B, 1), 0.7), atol=1e-4)
        assert ((negatives - 0.5).abs() < 1e-4).sum(dim=1).min() >= 4
        near_everything = (cosine.mean(dim=0) > 0.3).sum()
        assert near_everything == (2 if regime == "hub-heavy" else 0)


def test_labels_come_in_pairs_from_everywhere() -> None:
    for identities in (256, 10_000, 10_000_000):
        labels, counts = labels_in_pairs(512, identities, seed=1).unique(return_counts=True)
        assert len(labels) == 256
        assert counts.eq(2).all()
        assert labels[-1] < identities
        assert labels[-1] - labels[0] > identities // 2


def test_a_ratio_is_taken_to_the_neighbours() -> None:
    ratio = neighbours_ratios([1.0, 1.0, 3.0], [2.0, 2.0])
    assert ratio == Ratio(median=1.5, low=1.0, high=2.0, unit_seconds=1.0)
    assert ratio.inverse == Ratio(1 / 1.5, 0.5, 1.0, 1.0)


def test_who_cannot_serve_says_why() -> None:
    absent = Peer("absent", peers.eager, package="no_such_package", install="pip install it")
    assert absent.refusal(SIZE) == "not installed (No module named 'no_such_package'; pip install it)"
    refusal = PEERS["eager"].refusal(Size(10**6, 10**6, 8))
    assert refusal is not None
    assert refusal.startswith("needs about 18626 GiB at B1000000-M1000000-D8, ")
    assert PEERS["protomem-triton"].refusal(SIZE)
    assert PEERS["protomem-reference"].refusal(SIZE) is None


def test_peak_memory_tells_who_makes_the_logits() -> None:
    size = Size(256, 40_000, 8)
    logits = 4 * size.B * size.M
    assert memory.peak_extra_bytes("eager", size, WHATS[1]) > 2 * logits
    assert memory.peak_extra_bytes("protomem-reference", size, WHATS[1]) < logits
