"""Faults in ``aggregate_prototypes``: the reference and Triton, with the ordering of a batch."""

from tests.faults.fault import Fault

REFERENCE = "backends/reference/aggregate_prototypes.py"
TRITON_ROWS = "backends/triton/rows.py"
TRITON = "backends/triton/aggregate_prototypes.py"
T_AGGREGATE = "tests/ops/test_aggregate_prototypes.py"
T_SUM = "tests/backends/triton/test_aggregate_prototypes.py::test_aggregate_in_small_blocks"
T_REGISTRATION = "tests/ops/test_registration.py"

FAULTS = [
    Fault("missing normalisation of the embeddings", REFERENCE, "x = unit_rows(x)", "pass", T_AGGREGATE),
    Fault("weights ignored", REFERENCE, "total = sum_rows(q[:, None] * x", "total = sum_rows(x", T_AGGREGATE),
    Fault(
        "zero mass divides",
        REFERENCE,
        "take(mass, index) > 0, given, 1)",
        "take(mass, index) > 0, given, 0)",
        f"{T_AGGREGATE}::test_zero_weights_count_equally",
    ),
    Fault("antipodal images kept", REFERENCE, "ANTIPODAL = 1e-6", "ANTIPODAL = -1.0", T_AGGREGATE),
    Fault("negative labels take part", REFERENCE, "first &= ordered >= 0", "first &= ordered >= -1", T_AGGREGATE),
    Fault("gradient not projected", REFERENCE, "grad_prototypes - along * prototypes", "grad_prototypes", T_AGGREGATE),
    Fault("gradient of the mass lost", REFERENCE, " + take(grad_mass, index)", "", f"{T_AGGREGATE}::test_gradcheck"),
    Fault(
        "gradient ignores the weight",
        REFERENCE,
        "grad = q[:, None] * grad_sum",
        "grad = grad_sum",
        f"{T_AGGREGATE}::test_gradcheck",
    ),
    Fault(
        "bad weights count",
        REFERENCE,
        "torch.isfinite(weights) & (weights > 0), weights, 0)",
        "weights != 0, weights, 0)",
        f"{T_REGISTRATION}::test_unchecked_values_are_harmless",
    ),
    Fault(
        "last label not sorted", TRITON_ROWS, "mask=index < size, other=-1", "mask=index < size - 1, other=-1", T_SUM
    ),
    Fault(
        "order not stable", TRITON_ROWS, "(others[None, :] < rows[:, None])", "(others[None, :] > rows[:, None])", T_SUM
    ),
    Fault(
        "squares of rows underflow",
        TRITON_ROWS,
        "y = x / safe[:, None]",
        "y = x",
        f"{T_AGGREGATE}::test_huge_and_tiny_embeddings_keep_their_direction",
    ),
    Fault(
        "lengths whose squares leave the range",
        "rows.py",
        "lengths: Tensor = torch.linalg.vector_norm(y, dim=-1) * largest[..., 0]",
        "lengths: Tensor = torch.linalg.vector_norm(x, dim=-1)",
        f"{T_AGGREGATE}::test_no_length_and_no_weight_is_too_large_or_too_small",
    ),
    Fault(
        "gradients beyond the range of float16",
        "rows.py",
        "x = torch.where(torch.isfinite(x), x.clamp(-largest, largest), x)",
        "pass",
        f"{T_AGGREGATE}::test_float16_gradients_stay_in_range",
    ),
    Fault("mask at a segment's tail", TRITON, "keep = at < length\n", "keep = at <= length\n", T_SUM),
    Fault(
        "strides of the embeddings swapped",
        TRITON,
        "x = load_rows(embeddings_ptr, samples, columns, stride_embedding, stride_column,",
        "x = load_rows(embeddings_ptr, samples, columns, stride_column, stride_embedding,",
        T_SUM,
    ),
    Fault(
        "weightless identities get nothing",
        TRITON,
        "weights = tl.where(mass > 0, weights, 1.0)",
        "weights = tl.where(mass > 0, weights, 0.0)",
        T_SUM,
    ),
    Fault(
        "antipodal images kept",
        TRITON,
        "tl.constexpr(1e-6)",
        "tl.constexpr(-1.0)",
        f"{T_AGGREGATE}::test_almost_antipodal_images_have_no_direction",
    ),
    Fault("unused rows not written", TRITON, "sum_kernel[(max(size, rows),)]", "sum_kernel[(size,)]", T_SUM),
    Fault("rows past the last written", TRITON, "& (number < rows)", "& (number <= rows)", T_SUM),
    Fault("gradient not projected", TRITON, "(t - along[:, None] * x)", "(t)", T_SUM),
    Fault(
        "offset of an embedding in 32 bits",
        "backends/triton/tiles.py",
        "offsets = rows.to(tl.int64)[:, None] * stride_row",
        "offsets = rows.to(tl.int32)[:, None] * stride_row",
        f"{T_AGGREGATE}::test_embeddings_past_two_to_the_31_elements",
    ),
]
