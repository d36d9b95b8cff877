"""Faults in ``sampling``."""

from tests.faults.fault import Fault

T_SAMPLING = "tests/data/test_sampling.py"

FAULTS = [
    Fault(
        "groups not shuffled over epochs",
        "data/sampling.py",
        "shuffle = torch.randperm(len(catalogue.images), generator=generator)",
        "shuffle = torch.arange(len(catalogue.images))",
        T_SAMPLING,
    ),
    Fault(
        "batches that accelerate shares out are shared out before",
        "data/sharing.py",
        "if isinstance(owner, shard):",
        "if False:",
        f"{T_SAMPLING}::test_what_accelerate_shares_out_is_shared_out_once",
    ),
]
