"""What trains around a head: DistributedDataParallel, FSDP2, accumulation, autocast, scalers, checkpointing."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import protomem_kernels as pmk
from protomem_kernels import losses
from tests.distributed.pool import Pool

DIM, TOTAL, STEPS = 6, 20, 4


class Model(nn.Module):
    """An encoder with a head in it, as some wrap them together."""

    def __init__(self, head: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(5, 12, dtype=dtype), nn.Tanh(), nn.Linear(12, DIM, dtype=dtype))
        self.head = head

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.head(self.encoder(images), labels)
        return loss


def make_head(kind: str, group: Any = None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    if kind == "classes":
        head = pmk.MarginSoftmaxLoss(30, DIM, scale=8.0, dtype=dtype, process_group=group, **options)
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(30, DIM, generator=generator, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            head.weight.copy_(weights[head.first_class : head.first_class + len(head.weight)])
        return head
    return pmk.PrototypeMemoryLoss(
        DIM, 60, scale=8.0, margin=pmk.AdaFace(0.3, momentum=0.5), dtype=dtype, prototype_gradient=kind,
        process_group=group, **options,
    )  # fmt: skip


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randperm(10, generator=generator).repeat(2) for _ in range(STEPS)]
    return [(torch.randn(TOTAL, 5, generator=generator, dtype=torch.float64).to(dtype), own) for own in labels]


def own(batch: tuple[Tensor, Tensor], rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's part, the first rank's being the larger."""
    sizes = [TOTAL // ranks] * ranks
    sizes[0] += 3
    sizes[-1] += TOTAL - sum(sizes)
    return batch[0].split(sizes)[rank], batch[1].split(sizes)[rank]


def train(group: Any, kind: str, wrap: str, micro: int = 1) -> dict[str, Tensor]:
    """Train and return the encoder's weights, and how the head looks."""
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    head = make_head(kind, group)
    model: Any = Model(head)
    encoder: Any = model.encoder
    if wrap == "encoder":
        encoder = DistributedDataParallel(encoder, process_group=group)
    elif wrap == "all":
        model = DistributedDataParallel(pmk.distributed.prepare_ddp(model), process_group=group)
    elif wrap == "fsdp":
        fully_shard(encoder, mesh=dist.device_mesh.DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.2, momentum=0.9)
    if kind == "memory":
        head.attach_optimizer(optimizer)
    for at, batch in enumerate(batches()):
        images, labels = own(batch, rank, ranks) if group is not None else batch
        last = (at + 1) % micro == 0
        silent = last or wrap not in ("encoder", "all")
        with contextlib.nullcontext() if silent else (encoder if wrap == "encoder" else model).no_sync():
            loss = model(images, labels) if wrap == "all" else head(encoder(images), labels)
            (loss / micro).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    seen = {name: full(value) for name, value in encoder.state_dict().items()}
    return {name.removeprefix("module."): value for name, value in seen.items()} | {"loss": loss.detach()}


def full(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()


@pytest.mark.parametrize("wrap", ["encoder", "all", "fsdp"])
@pytest.mark.parametrize("kind", ["none", "fresh", "memory", "classes"])
def test_training_as_in_one_process(pool: Pool, kind: str, wrap: str) -> None:
    wanted = train(None, kind, "")
    for seen in pool.run(2, train, kind, wrap):
        for name, value in wanted.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("wrap", ["encoder", "all"])
def test_accumulation(pool: Pool, wrap: str) -> None:
    wanted = train(None, "memory", "", 2)
    for seen in pool.run(3, train, "memory", wrap, 2):
        for name, value in wanted.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-10, atol=1e-11)


def forgotten(group: Any, kind: str, shared: bool, buffers: bool) -> str | None:
    head = make_head(kind, group if shared else None)
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    model = DistributedDataParallel(Model(head), process_group=group, **{name: buffers})  # type: ignore[arg-type]
    if kind == "memory":
        head.attach_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        model(*own(batches()[0], dist.get_rank(group), 2))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["none", "memory", "classes"])
@pytest.mark.parametrize("buffers", [True, False])
def test_a_forgotten_preparation(pool: Pool, kind: str, buffers: bool) -> None:
    for message in pool.run(2, forgotten, kind, True, buffers):
        if kind == "none" and not buffers:
            assert message is None  # nothing is overwritten
            continue
        assert message is not None
        assert "protomem_kernels.distributed.prepare_ddp(model) before DistributedDataParallel(model)" in message
        assert {"none": "head.memory.identities", "memory": "head.memory.prototypes", "classes": "head.weight"}[
            kind
        ] in message


@pytest.mark.filterwarnings("ignore:process_group is None")
def test_a_forgotten_preparation_of_a_memory_of_its_own(pool: Pool) -> None:
    assert all("prepare_ddp" in message for message in pool.run(2, forgotten, "none", False, True))
    assert pool.run(2, forgotten, "classes", False, True) == [None, None]  # replicated weights are averaged, as ever


def memories_of_their_own(group: Any) -> Any:
    """Heads without a process group inside DDP, prepared: each rank keeps its own identities."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = make_head("none")
        model = DistributedDataParallel(pmk.distributed.prepare_ddp(Model(head)), process_group=group)
        rank = dist.get_rank(group)
        for images, labels in batches()[:2]:
            model(images, labels + 1000 * rank).backward()
    return sorted(head.memory.identities[head.memory.occupied].tolist())


def test_prepared_memories_without_a_group_are_left_alone(pool: Pool) -> None:
    first, second = pool.run(2, memories_of_their_own)
    assert first == list(range(10))
    assert second == list(range(1000, 1010))


def test_preparing_what_cannot_be() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        pmk.distributed.prepare_ddp("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must hold a head of protomem_kernels, got Linear without one"):
        pmk.distributed.prepare_ddp(nn.Linear(2, 2))


def test_preparing_keeps_what_was_left_out_before() -> None:
    model = Model(make_head("memory"))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["encoder.0.bias"])
    assert pmk.distributed.prepare_ddp(model) is model
    left_out = set(model._ddp_params_and_buffers_to_ignore)
    assert left_out == {"encoder.0.bias", *(f"head.memory.{name}" for name in pmk.MemoryState._fields)}


def prepared_twice(group: Any) -> str:
    model = DistributedDataParallel(pmk.distributed.prepare_ddp(Model(make_head("none", group))), process_group=group)
    try:
        pmk.distributed.prepare_ddp(model)
    except TypeError as error:
        return str(error)
    return ""


def test_preparing_too_late(pool: Pool) -> None:
    assert all("before it is wrapped" in message for message in pool.run(2, prepared_twice))


def narrow(group: Any, dtype: torch.dtype) -> Any:
    """Steps under autocast, or with float16 embeddings; losses and gradients."""
    rank = dist.get_rank(group) if group is not None else 0
    head = make_head("fresh", group, torch.float32, average_gradients=False)
    seen = []
    for batch in batches(torch.float32):
        images, labels = own(batch, rank, 2) if group is not None else batch
        leaf = images.clone().requires_grad_()
        torch.manual_seed(4)
        weight = torch.randn(DIM, 5)
        with torch.autocast("cpu", dtype):
            e = nn.functional.linear(leaf, weight)
            assert e.dtype == dtype
            loss = head(e, labels)
        assert loss.dtype == torch.float32
        loss.backward()
        seen.append((loss.detach(), leaf.grad))
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(pool: Pool, dtype: torch.dtype) -> None:
    ours, wanted = pool.run(2, narrow, dtype), narrow(None, dtype)
    for step in range(STEPS):
        for loss, _ in (ours[0][step], ours[1][step]):
            torch.testing.assert_close(loss, wanted[step][0], rtol=1e-5, atol=1e-5)
        grad = torch.cat([ours[0][step][1], ours[1][step][1]])
        size = float(wanted[step][1].abs().max())
        # Gradients of embeddings are rounded once to the narrow dtype, in one process and in two.
        torch.testing.assert_close(grad, wanted[step][1], rtol=0, atol=4 * torch.finfo(dtype).eps * size)


def scaled(group: Any, kind: str, scaler: str) -> Any:
    """Train with a gradient scaler, an infinity planted in rank 1's shard in the second step."""
    rank = dist.get_rank(group)
    head = make_head(kind, group, torch.float32)
    model = Model(head, torch.float32)
    encoder = DistributedDataParallel(model.encoder, process_group=group)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)
    if kind == "memory":
        head.attach_optimizer(optimizer)
    options = {"init_scale": 1024.0, "growth_interval": 1000}
    kinds = {"plain": torch.amp.GradScaler, "sharded": ShardedGradScaler}
    more = {"process_group": group} if scaler == "sharded" else {}
    scale: Any = kinds[scaler]("cpu", **options, **more)
    shared, seen = losses.overflow_shared, []
    for at, batch in enumerate(batches(torch.float32)):

        def planted(parameter: Tensor, ranks: Any, step: int = at) -> Tensor:
            given = shared(parameter, ranks)
            if step == 1 and rank == 1:
                given.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("inf")))
            return given

        losses.overflow_shared = planted
        try:
            loss = head(encoder(own(batch, rank, 2)[0]), own(batch, rank, 2)[1])
        finally:
            losses.overflow_shared = shared
        optimizer.zero_grad()
        rows = next(head.parameters())
        before = rows.detach().clone(), encoder.module[0].weight.detach().clone()
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        moved = [not torch.equal(a, b) for a, b in zip(before, (rows, encoder.module[0].weight), strict=True)]
        seen.append((scale.get_scale(), moved, bool(torch.isfinite(rows).all())))
    return seen, {name: value.clone() for name, value in encoder.module.state_dict().items()}


@pytest.mark.parametrize("scaler", ["plain", "sharded"])
@pytest.mark.parametrize("kind", ["memory", "classes"])
def test_an_infinity_in_one_shard(pool: Pool, kind: str, scaler: str) -> None:
    (first, one), (second, other) = pool.run(2, scaled, kind, scaler)
    assert first == second
    assert [scale for scale, _, _ in first] == [1024.0, 512.0, 512.0, 512.0]
    assert [moved for _, moved, _ in first] == [[True, True], [False, False], [True, True], [True, True]]
    assert all(finite for _, _, finite in first)
    for name, value in one.items():
        assert torch.equal(value, other[name])


def recomputed(group: Any, again: bool) -> Any:
    """A step whose encoder and head are one checkpointed region."""
    model = Model(make_head("fresh", group))
    seen = []
    for batch in batches()[:2]:
        images, labels = own(batch, dist.get_rank(group), 2)
        model.zero_grad()
        loss = checkpoint(model, images, labels, use_reentrant=False) if again else model(images, labels)
        loss.backward()
        seen.append((loss.item(), model.encoder[0].weight.grad.clone(), int(model.head.memory.clock)))
    return seen


def test_activation_checkpointing(pool: Pool) -> None:
    for plain, again in zip(pool.run(2, recomputed, False), pool.run(2, recomputed, True), strict=True):
        for (loss, grad, clock), (same_loss, same_grad, same_clock) in zip(plain, again, strict=True):
            assert (loss, clock) == (same_loss, same_clock)
            torch.testing.assert_close(grad, same_grad, rtol=1e-13, atol=1e-13)


def warmed(group: Any) -> Any:
    head = make_head("fresh", group)
    pmk.warm_up(head, 4)
    return len(head.memory), int(head.memory.clock), float(head.margin.mean)


def test_warm_up(pool: Pool) -> None:
    assert pool.run(2, warmed) == [(0, 0, 20.0)] * 2


def unrecognizable(group: Any) -> Any:
    """The running direction of unrecognizable images, fed by ranks with different numbers of them."""
    quality = pmk.RecognizabilityQuality(DIM, momentum=0.3)
    rank = dist.get_rank(group) if group is not None else 0
    pmk.PrototypeMemoryLoss(DIM, 60, quality=pmk.SoftmaxQuality(quality), process_group=group)
    for step in range(2):
        images = torch.randn(9, DIM, generator=torch.Generator().manual_seed(step))
        quality.update_unrecognizable(images if group is None else images.split([2, 0, 7])[rank])
    with pytest.raises(ValueError, match="embeddings must have shape"):
        quality.update_unrecognizable(torch.zeros(2, DIM + (rank == dist.get_world_size(group) - 1 if group else 1)))
    return quality.unrecognizable


def test_unrecognizable_images_of_all_ranks(pool: Pool) -> None:
    wanted = unrecognizable(None)
    for seen in pool.run(3, unrecognizable):
        torch.testing.assert_close(seen, wanted)


def elastic(group: Any) -> Any:
    """ElasticFace, each rank with a generator in another state: all see rank 0's margins."""
    rank = dist.get_rank(group)
    torch.manual_seed(rank)
    head = pmk.PrototypeMemoryLoss(DIM, 60, margin=pmk.ElasticFace(0.3, 0.2), process_group=group)
    e = torch.randn(4, DIM, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    loss = head(e, torch.arange(4) // 2 + 2 * rank)
    loss.backward()
    return loss.item()


def test_random_margins_are_those_of_rank_0(pool: Pool) -> None:
    first, second = pool.run(2, elastic)
    assert first == second
