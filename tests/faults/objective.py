"""Faults in what a loss is."""

from tests.faults.fault import Fault

OBJECTIVE = "objective.py"
T_LOSS = "tests/ops/test_margin_softmax_loss.py"
T_TWO_BANKS = f"{T_LOSS}::test_two_banks_equal_one"
T_LOSSES = "tests/test_losses.py"

FAULTS = [
    Fault(
        "ignored samples counted in the mean",
        OBJECTIVE,
        "loss / kept.sum().clamp(min=1)",
        "loss / max(kept.numel(), 1)",
        T_LOSS,
    ),
    Fault(
        "sign of the target logit",
        OBJECTIVE,
        "excess = n - scale * target_map(cosine)",
        "excess = n + scale * target_map(cosine)",
        T_LOSS,
    ),
    Fault(
        "NaN of ignored samples leaks", OBJECTIVE, "torch.where(counts[:, None], embeddings, 0)", "embeddings", T_LOSS
    ),
    Fault(
        "both banks empty gives NaN",
        OBJECTIVE,
        'neither = (a == float("-inf")) & (b == float("-inf"))',
        "neither = torch.zeros_like(a, dtype=torch.bool)",
        T_LOSSES,
    ),
    Fault(
        "hardest negatives of each bank, not of both",
        OBJECTIVE,
        "list(torch.where(kept, slots, -1)",
        "list(torch.where(kept | True, slots, -1)",
        T_LOSS,
    ),
    Fault("a target in one bank of two is none", OBJECTIVE, ".any(dim=0)", ".all(dim=0)", T_TWO_BANKS),
    Fault(
        "the second bank's negatives left out",
        OBJECTIVE,
        "n = n_here if n is None else",
        "n = n_here if 1 else",
        T_TWO_BANKS,
    ),
    Fault(
        "a margin's penalty left out",
        OBJECTIVE,
        "losses = losses + penalty",
        "pass",
        f"{T_LOSSES}::test_magface_with_its_regulariser",
    ),
]
