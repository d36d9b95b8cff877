"""The samplers against the promises of their docstrings, counted in plain Python."""

import importlib.util
import subprocess
import sys
import types
from collections import Counter
from math import ceil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from protomem_kernels import PrototypeMemory
from protomem_kernels.data import sampling
from protomem_kernels.data.sampling import DoppelgangerBatchSampler, IdentityBatchSampler

# Hypothesis draws few identities.
pytestmark = pytest.mark.filterwarnings("ignore:identities_per_batch is")


class RingMemory:
    """A fake memory: the neighbours of identity c are c + 1, c + 2, ... on a ring; some identities are not known."""

    def __init__(self, size: int, unknown: frozenset[int] = frozenset()):
        self.size, self.unknown = size, unknown
        self.calls: list[list[int]] = []

    def doppelgangers(self, labels, k):
        self.calls.append(labels.tolist())
        identities = (labels[:, None] + 1 + torch.arange(k)) % self.size
        known = torch.tensor([label not in self.unknown for label in labels.tolist()])
        return torch.ones(len(labels), k), torch.where(known[:, None], identities, -1)


class RandomMemory:
    """Neighbours at random, also unknown ones, foreign ones and the identity itself: whatever may come."""

    def __init__(self, seed: int):
        self.seed = seed

    def doppelgangers(self, labels, k):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.zeros(len(labels), k), torch.randint(-1, 12, (len(labels), k), generator=generator)


def groups_of(batch: list[int], k: int) -> list[tuple[int, ...]]:
    assert len(batch) % k == 0
    return [tuple(batch[start : start + k]) for start in range(0, len(batch), k)]


samplers = st.fixed_dictionaries(
    {
        "labels": st.lists(st.integers(-1, 8), min_size=1, max_size=80).filter(lambda labels: max(labels) >= 0),
        "identities_per_batch": st.integers(1, 7),
        "images_per_identity": st.integers(1, 4),
        "seed": st.integers(0, 2**40),
        "num_replicas": st.integers(1, 4),
        "doppelgangers": st.booleans(),
    }
)


def build(options: dict, **more) -> list:
    options = {**options, **more}
    kind = IdentityBatchSampler
    if options.pop("doppelgangers"):
        kind, options["memory"] = DoppelgangerBatchSampler, RandomMemory(options["seed"] % 2**31)
        options["refresh_every"] = 1 + options["seed"] % 4
    return [kind(rank=rank, **options) for rank in range(options["num_replicas"])]


@settings(deadline=None, max_examples=60)
@given(samplers, st.integers(0, 5))
def test_an_epoch_walks_every_image_in_equal_batches_of_distinct_identities(options, epoch):
    labels, k, ranks = options["labels"], options["images_per_identity"], options["num_replicas"]
    images = Counter(label for label in labels if label >= 0)
    group_total = sum(ceil(count / k) for count in images.values())
    wanted = min(options["identities_per_batch"], len(images))

    per_rank = []
    for sampler in build(options):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == ceil(group_total / (wanted * ranks))
        per_rank.append(batches)
    batches = [batch for rank in per_rank for batch in rank]
    groups = [group for batch in batches for group in groups_of(batch, k)]

    # Every image at least once, none without an identity.
    assert {index for group in groups for index in group} == {i for i, label in enumerate(labels) if label >= 0}
    # Each group shows one identity; each identity has the fewest groups that hold its images; no group goes out twice
    # unless the ranks outnumber the groups.
    assert all(len({labels[index] for index in group}) == 1 for group in groups)
    if group_total >= len(batches):
        assert Counter(labels[group[0]] for group in groups) == {c: ceil(n / k) for c, n in images.items()}
        # Images are used once, but for those that top up the last group: fewer than k per identity.
        used = Counter(index for group in groups for index in group)
        for identity, count in images.items():
            extra = sum(used[index] - 1 for index in range(len(labels)) if labels[index] == identity)
            assert extra == ceil(count / k) * k - count
    else:
        assert len(groups) == len(batches)
    # No repeats in a group where the identity has enough images, even repeats where it has not.
    for group in groups:
        have = images[labels[group[0]]]
        assert len(set(group)) == min(k, have)
        assert max(Counter(group).values()) == ceil(k / min(k, have))
    # Equal sizes to within one group, never too large.
    sizes = [len(batch) // k for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= wanted
    # Distinct identities in a batch as long as no identity has more groups than there are batches.
    counts = Counter(labels[group[0]] for group in groups)
    if max(counts.values()) <= len(batches):
        for batch in batches:
            assert max(Counter(labels[group[0]] for group in groups_of(batch, k)).values()) == 1
    # And where one has, it stands in all of them.
    for identity, count in counts.items():
        if count >= len(batches):
            assert all(identity in {labels[index] for index in batch} for batch in batches)


@settings(deadline=None, max_examples=40)
@given(samplers)
def test_drop_last_leaves_only_full_batches(options):
    labels, k = options["labels"], options["images_per_identity"]
    images = Counter(label for label in labels if label >= 0)
    wanted = min(options["identities_per_batch"], len(images))
    group_total = sum(ceil(count / k) for count in images.values())

    built = build(options, drop_last=True)
    batches = [batch for sampler in built for batch in sampler]
    assert {len(sampler) for sampler in built} == {group_total // (wanted * len(built))}
    assert len(batches) == len(built) * len(built[0])
    assert all(len(batch) == wanted * k for batch in batches)
    groups = Counter(labels[group[0]] for batch in batches for group in groups_of(batch, k))
    assert all(count <= ceil(images[identity] / k) for identity, count in groups.items())


@settings(deadline=None, max_examples=20)
@given(samplers, st.integers(0, 1000))
def test_an_epoch_is_a_function_of_seed_and_epoch(options, epoch):
    first, second = build(options)[0], build(options)[0]
    for _ in range(2):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        once = list(first)
        assert once == list(first) == list(second)
        epoch += 1


@pytest.mark.parametrize("doppelgangers", [False, True])
def test_epochs_and_seeds_differ(doppelgangers):
    options = {
        "labels": torch.arange(30).repeat_interleave(10).tolist(),
        "identities_per_batch": 8,
        "images_per_identity": 4,
        "num_replicas": 1,
        "doppelgangers": doppelgangers,
    }
    seen = set()
    for seed in range(3):
        (sampler,) = build({**options, "seed": seed})
        for epoch in range(3):
            sampler.set_epoch(epoch)
            seen.add(str(list(sampler)))
    assert len(seen) == 9


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(IdentityBatchSampler([0, 0, 1, 1], 2, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_random_batches_mix_all_pairs_of_identities():
    sampler = IdentityBatchSampler(torch.arange(12).repeat_interleave(8), 4, 2)
    met = Counter()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        for batch in sampler:
            present = sorted({index // 8 for index in batch})
            met.update((a, b) for a in present for b in present if a < b)
    assert len(met) == 12 * 11 / 2
    assert max(met.values()) < 2 * min(met.values())


def test_a_batch_holds_anchors_and_their_neighbours():
    memory = RingMemory(40)
    sampler = DoppelgangerBatchSampler(torch.arange(40).repeat_interleave(4), memory, 4, 4, neighbours=3)
    first = next(iter(sampler))
    present = sorted({index // 4 for index in first})
    runs = [[(start + step) % 40 for step in range(4)] for start in present]
    assert any(sorted(run) == present for run in runs)


def test_a_prototype_memory_brings_look_alikes_together():
    torch.manual_seed(0)
    twins = torch.nn.functional.normalize(torch.randn(20, 8)).repeat_interleave(2, dim=0)  # 2 c and 2 c + 1 look alike
    identities = torch.arange(40) * 1000
    memory = PrototypeMemory(64, 8)
    sampler = DoppelgangerBatchSampler(identities.repeat_interleave(3), memory, 8, 3, neighbours=1)
    assert len(list(sampler)) == 5  # nothing in the memory yet
    memory.update(twins + 0.01 * torch.randn(40, 8), identities)
    for batch in sampler:
        present = {index // 3 for index in batch}
        assert present == {identity ^ 1 for identity in present}


def test_neighbours_meet_far_more_often_than_at_random():
    labels = torch.arange(60).repeat_interleave(12)

    def meetings(sampler) -> float:
        found = []
        for batch in sampler:
            present = {int(labels[index]) for index in batch}
            found.append(sum((c + 1) % 60 in present for c in present) / len(present))
        return sum(found) / len(found)

    hard = meetings(DoppelgangerBatchSampler(labels, RingMemory(60), 8, 3, neighbours=1))
    random = meetings(IdentityBatchSampler(labels, 8, 3))
    assert random < 0.25
    assert hard > 0.45  # with pairs, every second identity has its neighbour beside it


def test_an_identity_outside_the_memory_is_filled_up_at_random_and_still_walked():
    labels = torch.arange(10).repeat_interleave(2)
    memory = RingMemory(10, unknown=frozenset(range(10)))
    batches = list(DoppelgangerBatchSampler(labels, memory, 5, 2))
    assert batches == list(IdentityBatchSampler(labels, 5, 2))


def test_labels_are_looked_up_once_each_and_anew_each_epoch(monkeypatch):
    monkeypatch.setattr("protomem_kernels.data.sampling._LOOKUP_CHUNK", 2)
    memory = RingMemory(1000)
    labels = [907, 5, -3, 5, 30, 907, 30]
    sampler = DoppelgangerBatchSampler(labels, memory, 2, 2)
    assert memory.calls == []
    list(sampler)
    assert memory.calls == [[5, 30], [907]]
    list(sampler)
    assert memory.calls == [[5, 30], [907]] * 2
    list(sampler)
    assert len(memory.calls) == 6


def test_a_memory_that_fills_within_an_epoch_is_asked_within_it():
    """The first epoch on a large data set begins with an empty memory, and may be all that is ever trained."""
    twins = torch.nn.functional.normalize(torch.randn(20, 8)).repeat_interleave(2, dim=0)
    labels = torch.arange(40).repeat_interleave(40)

    def twins_together(refresh_every: int) -> float:
        memory = PrototypeMemory(64, 8)
        sampler = DoppelgangerBatchSampler(labels, memory, 8, 2, neighbours=1, refresh_every=refresh_every)
        paired = []
        for batch in sampler:
            present = labels[batch].unique()
            memory.update(twins[present], present)
            paired.append(sum(int(c) ^ 1 in present for c in present) / len(present))
        assert len(paired) == 100
        assert sorted(set(paired[:10])) != [1.0]
        return sum(paired[20:80]) / 60

    assert twins_together(10) > 0.9
    assert twins_together(100) < 0.4


def test_look_ups_are_counted_in_batches_of_a_rank():
    labels = torch.arange(40).repeat_interleave(8)
    for ranks, batches in ((1, 40), (2, 20)):
        memory = RingMemory(40)
        sampler = DoppelgangerBatchSampler(labels, memory, 4, 2, num_replicas=ranks, rank=0, refresh_every=7)
        assert len(list(sampler)) == batches
        assert len(memory.calls) == ceil(batches / 7)


def test_labels_may_be_as_large_as_int64():
    top = 2**63 - 1
    sampler = IdentityBatchSampler([top, 0, top, 0], 2, 2)
    assert sorted(next(iter(sampler))) == [0, 1, 2, 3]


def test_the_memory_is_asked_on_its_own_device_and_without_gradient():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("prototypes", torch.zeros(2, device="meta"))

        def doppelgangers(self, labels, k):
            assert labels.device.type == "meta"
            assert not torch.is_grad_enabled()
            return torch.zeros(4, k), torch.full((4, k), -1)

    sampler = DoppelgangerBatchSampler([0, 1, 2, 3], Module(), 2, 1)
    assert len(list(sampler)) == 2


def test_a_data_loader_takes_it():
    labels = torch.arange(6).repeat_interleave(3)
    sampler = IdentityBatchSampler(labels, 2, 3)
    for batch in DataLoader(list(labels), batch_sampler=sampler):
        assert batch.unique(return_counts=True)[1].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [0.5, 1.0]}, TypeError, "labels must be integers, got torch.float32"),
        ({"labels": [True, False]}, TypeError, "labels must be integers, got torch.bool"),
        ({"labels": [[0, 1]]}, ValueError, r"labels must have shape \(N,\), got \(1, 2\)"),
        ({"labels": [-1, -1]}, ValueError, "labels must hold at least one identity .* got none in 2 labels"),
        ({"identities_per_batch": 0}, ValueError, "identities_per_batch must be at least 1, got 0"),
        ({"images_per_identity": -2}, ValueError, "images_per_identity must be at least 1, got -2"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be at least 1, got 0"),
        ({"num_replicas": 2, "rank": 2}, ValueError, r"rank must be in \[0, 2\) for num_replicas = 2, got 2"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(change, error, message):
    options = {"labels": [0, 0, 1, 1], "identities_per_batch": 2, "images_per_identity": 2, **change}
    with pytest.raises(error, match=message):
        IdentityBatchSampler(**options)


class Series:
    """What counts of a pandas Series: item ``i`` is the one with index ``i``, and not the one at position ``i``."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __getitem__(self, index):
        return self.values[::-1][index]

    def __len__(self):
        return len(self.values)

    def to_numpy(self):
        return self.values


HASHES = np.array([2**63 + 5, 2**63 + 5, 7, 7, 2**64 - 1, 2**64 - 1], dtype=np.uint64)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([3, 3, 8, 8, 9, 9], np.int32),
        np.array([3, 3, 8, 8, 9, 9], np.uint8),
        np.array([3, 3, 8, 8, 9, 9], ">i4"),
        np.repeat(np.arange(3), 2)[::-1],
        list(np.array([3, 3, 8, 8, 9, 9])),
        torch.tensor([3, 3, 8, 8, 9, 9], dtype=torch.int16),
        Series([3, 3, 8, 8, 9, 9]),
        np.array([3, 3, 8, 8, 9, 9], object),
        HASHES,
        torch.from_numpy(HASHES),
        HASHES.tolist(),
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
def test_labels_in_whatever_form(labels):
    sampler = IdentityBatchSampler(labels, 1, 2)
    assert sorted(sorted(batch) for batch in sampler) == [[0, 1], [2, 3], [4, 5]]
    assert len(list(DoppelgangerBatchSampler(labels, PrototypeMemory(4, 4), 1, 2))) == 3


def test_a_hash_whose_bits_are_those_of_none_is_nobodys_neighbour():
    class Memory:
        def doppelgangers(self, labels, k):
            return torch.zeros(len(labels), k), torch.full((len(labels), k), -1)

    sampler = DoppelgangerBatchSampler(HASHES, Memory(), 2, 2)
    assert (sampler._neighbours(1) == -1).all()


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            ["ann", "bob"],
            TypeError,
            r"labels must be integers of shape \(N,\), got 'ann' \(str\) at index 0; .*np?.*unique",
        ),
        (
            np.array(["ann", "bob"]),
            TypeError,
            r"labels must be integers of shape \(N,\), got <U3; number them: numpy.unique",
        ),
        ("ann", TypeError, r"labels must be a tensor of shape \(N,\), or integers that make one, got str"),
        ([3, None], TypeError, r"got None \(NoneType\) at index 1"),
        ([2**64, 1], ValueError, "labels must be integers of at most 64 bits, got 18446744073709551616 at index 0"),
        ([[0], [0, 1]], TypeError, r"labels must be integers of shape \(N,\), got \[0\] \(list\) at index 0"),
        (
            torch.zeros(4, 1).long(),
            ValueError,
            r"must have shape \(N,\), got \(4, 1\); labels.squeeze\(1\) makes it so",
        ),
        (torch.zeros(4), TypeError, r"must be integers, got torch.float32; labels.long\(\) makes it so"),
    ],
)
def test_labels_that_say_no_identity(labels, error, message):
    with pytest.raises(error, match=message):
        IdentityBatchSampler(labels, 2, 2)


@pytest.mark.filterwarnings("default")
def test_more_identities_than_there_are_is_said():
    with pytest.warns(
        UserWarning, match="identities_per_batch is 16, and there are 10 identities: a batch holds no more"
    ):
        sampler = IdentityBatchSampler(torch.arange(10).repeat_interleave(4), 16, 2)
    assert [len(batch) for batch in sampler] == [20, 20]


# Lightning and accelerate


def test_set_epoch_is_found_where_lightning_and_accelerate_look():
    labels = torch.arange(12).repeat_interleave(4)
    loader = DataLoader(list(labels), batch_sampler=IdentityBatchSampler(labels, 4, 2))
    expected = IdentityBatchSampler(labels, 4, 2)
    for epoch in range(3):
        loader.batch_sampler.sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert list(loader.batch_sampler) == list(expected)
        positions = [index for batch in expected for index in batch]
        assert list(loader.batch_sampler.sampler) == positions


def test_the_ranks_are_asked_for_at_the_start_of_an_epoch(monkeypatch):
    """Many make their loaders before they start torch.distributed."""
    labels = torch.arange(12).repeat_interleave(2)
    sampler = IdentityBatchSampler(labels, 3, 2)
    assert len(sampler) == 4
    monkeypatch.setattr(sampling, "_distributed", lambda: True)
    monkeypatch.setattr(sampling.dist, "get_world_size", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(sampling.dist, "get_rank", lambda rank=rank: rank)
        assert (sampler.num_replicas, sampler.rank, len(sampler)) == (2, rank, 2)
        seen += [index for batch in sampler for index in batch]
    assert sorted(seen) == list(range(24))


class Shard:
    """As accelerate wraps the batch sampler of a loader that it prepares."""

    def __init__(self, batch_sampler, num_processes, process_index):
        self.batch_sampler, self.num_processes, self.process_index = batch_sampler, num_processes, process_index

    def __len__(self):
        return len(self.batch_sampler) // self.num_processes

    def __iter__(self):
        for number, batch in enumerate(self.batch_sampler):
            if number % self.num_processes == self.process_index:
                yield batch


class Dispatcher:
    """As accelerate reads batches in one process alone, and hands them on."""

    def __init__(self, loader, num_processes):
        self.loader, self.state = loader, types.SimpleNamespace(num_processes=num_processes)

    def __iter__(self):
        yield from self.loader


@pytest.fixture(params=["as accelerate does", "accelerate"])
def shard(request, monkeypatch):
    """accelerate's own wrapper where it is installed, and ours, which does the same."""
    if request.param == "accelerate":
        if importlib.util.find_spec("accelerate") is None:
            pytest.skip("accelerate is not installed")
        from accelerate.data_loader import BatchSamplerShard

        return BatchSamplerShard
    module = types.ModuleType("accelerate.data_loader")
    module.BatchSamplerShard, module.DataLoaderDispatcher = Shard, Dispatcher
    monkeypatch.setitem(sys.modules, "accelerate.data_loader", module)
    return Shard


@pytest.mark.parametrize("doppelgangers", [False, True])
@pytest.mark.parametrize("knows", [None, 1, 2])
def test_what_accelerate_shares_out_is_shared_out_once(shard, knows, doppelgangers):
    labels = torch.arange(15).repeat_interleave(4)
    seen = []
    for rank in range(2):
        options = {"num_replicas": knows, "rank": rank if knows == 2 else 0}
        (sampler, *_) = build(
            {
                "labels": labels.tolist(),
                "identities_per_batch": 4,
                "images_per_identity": 2,
                "seed": 3,
                "num_replicas": 1,
                "doppelgangers": doppelgangers,
            }
        )
        sampler._num_replicas, sampler._rank = options["num_replicas"], options["rank"]
        prepared = DataLoader(list(labels), batch_sampler=shard(sampler, 2, rank))
        assert len(prepared) == 4
        batches = list(prepared.batch_sampler)
        assert len(batches) == 4
        seen += [index for batch in batches for index in batch]
        # The same sampler in a loader that is not prepared: it shares out itself, or not at all.
        assert len(list(sampler)) == len(sampler) == (4 if knows == 2 else 8)
    assert sorted(seen) == list(range(60))


def test_what_one_process_hands_on_is_all_there(monkeypatch):
    module = types.ModuleType("accelerate.data_loader")
    module.BatchSamplerShard, module.DataLoaderDispatcher = Shard, Dispatcher
    monkeypatch.setitem(sys.modules, "accelerate.data_loader", module)
    labels = torch.arange(16).repeat_interleave(2)
    sampler = IdentityBatchSampler(labels, 4, 2, num_replicas=2, rank=0)
    batches = list(Dispatcher(DataLoader(list(range(32)), batch_sampler=sampler), 2))
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(32))


def test_two_who_share_out_among_different_numbers(shard):
    sampler = IdentityBatchSampler(torch.arange(16), 4, 1, num_replicas=4, rank=0)
    with pytest.raises(
        ValueError, match=r"num_replicas must be 2, or left out, to be shared out by accelerate .* got 4"
    ):
        list(shard(sampler, 2, 0))


def test_bad_neighbours_and_a_bad_memory():
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        DoppelgangerBatchSampler([0, 1], RingMemory(2), 2, 1, neighbours=0)
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        DoppelgangerBatchSampler([0, 1], RingMemory(2), 2, 1, refresh_every=0)

    class Flat:
        def doppelgangers(self, labels, k):
            return torch.zeros(len(labels)), torch.zeros(len(labels), dtype=torch.int64)

    message = r"memory.doppelgangers must return identities of shape \(2, k\), got \(2,\)"
    with pytest.raises(ValueError, match=message):
        list(DoppelgangerBatchSampler([0, 1], Flat(), 2, 1))


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from protomem_kernels.data.sampling import DoppelgangerBatchSampler

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

class Disagreeing:  # each rank would see other neighbours
    def doppelgangers(self, labels, k):
        return torch.zeros(len(labels), k), (labels[:, None] + 1 + rank + torch.arange(k)) % 20

sampler = DoppelgangerBatchSampler(torch.arange(20).repeat_interleave(4), Disagreeing(), 5, 2)
assert (sampler.rank, sampler.num_replicas, len(sampler)) == (rank, 2, 4)
mine = [None, None]
dist.all_gather_object(mine, list(sampler))
images = [index for batches in mine for batch in batches for index in batch]
assert sorted(images) == list(range(80)), images
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_ranks_share_an_epoch_even_if_their_memories_disagree(tmp_path):
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        try:
            _, errors = rank.communicate(timeout=120)
        finally:
            rank.kill()
        assert rank.returncode == 0, errors


@pytest.mark.parametrize("seed", range(5))
def test_an_identity_with_more_groups_than_batches_stands_in_all_of_them(seed):
    sampler = IdentityBatchSampler([0, 0, 0, 0, 1], 2, 1, seed=seed)  # 5 groups in 3 batches
    batches = list(sampler)
    assert sorted(map(len, batches)) == [1, 2, 2]
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert all(set(batch) - {4} for batch in batches)


def test_skewed_identities_take_linear_time():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(100_000, generator=generator) ** 6 * 20_000).long()  # identity 0 has a fifth of all images

    class Memory:
        def doppelgangers(self, labels, k):
            return torch.zeros(len(labels), k), (labels[:, None] + torch.arange(1, k + 1)) % 20_000

    batches = list(DoppelgangerBatchSampler(labels, Memory(), 64, 2))
    assert torch.equal(torch.tensor([i for batch in batches for i in batch]).unique(), torch.arange(100_000))
