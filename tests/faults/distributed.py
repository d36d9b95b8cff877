"""Faults in ``distributed``, and in what spreads memories and class weights over ranks."""

from tests.faults.fault import Fault

T_EXACT = "tests/distributed/test_exact.py"
T_RINGS = "tests/distributed/test_rings.py"
T_REFUSALS = "tests/distributed/test_refusals.py"
T_TRAINING = "tests/distributed/test_training.py"
T_CLASSES = "tests/distributed/test_class_weights.py"
T_COLLECTIVES = "tests/distributed/test_collectives.py"
SAME_ERROR = f"{T_REFUSALS}::test_the_same_error_on_every_rank_before_any_write"

FAULTS = [
    Fault(
        "owners by plain remainder",
        "distributed/owners.py",
        "torch.remainder(mix(identities), ranks)",
        "torch.remainder(identities, ranks)",
        f"{T_RINGS}::test_owners_are_those_of_the_formula",
    ),
    Fault(
        "owners by a signed shift",
        "distributed/owners.py",
        "(z >> bits) & ((1 << (64 - bits)) - 1)",
        "z >> bits",
        f"{T_RINGS}::test_owners_are_those_of_the_formula",
    ),
    Fault(
        "settings that differ pass",
        "distributed/agreement.py",
        "            _raise_what_differs(ranks, given)",
        "            pass",
        f"{SAME_ERROR}[scale]",
    ),
    Fault(
        "equal batches are believed at once",
        "distributed/agreement.py",
        'given["the number of rows (equal_batches=True)"] = str(rows)',
        "pass",
        f"{SAME_ERROR}[equal_batches]",
    ),
    Fault(
        "more identities than an owner has slots",
        "memory.py",
        "        self._refuse_more_than_fit(batch.labels)\n",
        "",
        f"{SAME_ERROR}[too many]",
    ),
    Fault(
        "another rank's shard is loaded",
        "memory.py",
        '        self._refuse_others_identities("", loaded.identities)\n',
        "",
        f"{T_REFUSALS}::test_states_stay_with_their_rank",
    ),
    Fault(
        "every rank takes all identities for its own",
        "memory.py",
        "torch.where(owners(labels, self.ranks.size) == self.ranks.rank, labels, -1)",
        "labels",
        f"{T_EXACT}::test_least_recently_written[none]",
    ),
    Fault(
        "slots of another rank's shard",
        "memory.py",
        "first = self.ranks.rank * self.shard_size",
        "first = 0",
        f"{T_RINGS}::test_slots_count_through_the_shards",
    ),
    Fault(
        "doppelgangers of this rank's shard alone",
        "memory.py",
        "for value in largest(self.ranks, cosines, identities))",
        "for value in (cosines, identities))",
        f"{T_EXACT}::test_equal_batches",
    ),
    Fault(
        "the factor of data-parallel training left out",
        "distributed/batch.py",
        "ctx.rows.scatter_sum(grad) * ctx.factor",
        "ctx.rows.scatter_sum(grad)",
        f"{T_EXACT}::test_the_factor_of_data_parallel",
    ),
    Fault(
        "every sample's loss counts as this rank's upstream",
        "distributed/batch.py",
        "upstreams = rows.ranks.all_gather(grad)",
        "upstreams = [grad] * len(rows.sizes)",
        f"{T_EXACT}::test_reductions",
    ),
    Fault(
        "norms are differentiated on every rank",
        "shards.py",
        "self.rows.differentiated_once(torch.where(counts, norm, 0))",
        "torch.where(counts, norm, 0)",
        f"{T_EXACT}::test_margins[mag]",
    ),
    Fault(
        "every shard's negatives pass on the whole gradient",
        "shards.py",
        "grad_n * share, None",
        "grad_n, None",
        f"{T_EXACT}::test_mining_rules[none-none]",
    ),
    Fault(
        "each rank's own maximum",
        "shards.py",
        "ranks.max_(n.clone())",
        "n.clone()",
        f"{T_EXACT}::test_a_scale_beyond_every_offset",
    ),
    Fault(
        "hardest negatives of each shard",
        "distributed/batch.py",
        "scatter_(1, best, True)",
        "fill_(True)",
        f"{T_EXACT}::test_mining_rules[hardest-none]",
    ),
    Fault(
        "the target's cosine of this shard alone before the sum",
        "shards.py",
        "present, self._target_cosine = self.rows.ranks.sum_(found)",
        "present, self._target_cosine = self.rows.ranks.sum_(found)[0], found.clone()[1] * 0",
        f"{T_EXACT}::test_mining_rules[mv-none]",
    ),
    Fault(
        "an infinity stays with its shard",
        "distributed/batch.py",
        'torch.where(broken > 0, grad.new_full((), float("inf")), grad)',
        "grad",
        f"{T_TRAINING}::test_an_infinity_in_one_shard[memory-plain]",
    ),
    Fault(
        "random margins of each rank",
        "margins.py",
        "self.ranks.first_(drawn)",
        "drawn",
        f"{T_TRAINING}::test_random_margins_are_those_of_rank_0",
    ),
    Fault(
        "unrecognizable images of this rank alone",
        "quality.py",
        "self.ranks.sum_(torch.where(finite, x, 0).sum(dim=0, keepdim=True))",
        "torch.where(finite, x, 0).sum(dim=0, keepdim=True)",
        f"{T_TRAINING}::test_unrecognizable_images_of_all_ranks",
    ),
    Fault(
        "preparing leaves the memory to DistributedDataParallel",
        "distributed/data_parallel.py",
        "    leave_out_of_ddp(model, _names(model))\n",
        "",
        f"{T_TRAINING}::test_training_as_in_one_process[none-all]",
    ),
    Fault(
        "a forgotten preparation passes",
        "distributed/data_parallel.py",
        "    if taken:\n",
        "    if False:\n",
        f"{T_TRAINING}::test_a_forgotten_preparation[True-none]",
    ),
    Fault(
        "nobody is told of memories of their own",
        "memory.py",
        "                warn_of_own_memory()",
        "                pass",
        f"{T_COLLECTIVES}::test_without_a_process_group_there_is_one_warning_and_no_collective",
    ),
    Fault(
        "a sample's class is not drawn",
        "losses.py",
        "torch.where(targets < 0, rows, targets), 2.0)",
        "torch.where(targets < 0, rows, targets), -2.0)",
        f"{T_CLASSES}::test_sampling_in_one_process",
    ),
    Fault(
        "shards of equal class weights",
        "losses.py",
        "int(torch.randint(2**62, ())) + self.ranks.rank",
        "int(torch.randint(2**62, ()))",
        f"{T_CLASSES}::test_shards_begin_with_different_rows",
    ),
]
