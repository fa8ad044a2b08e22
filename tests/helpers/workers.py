"""What the processes of test_distributed.py run; a module of its own, so that they can import it by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import relative
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_detectors import Detector, Loop, images
from truth import Pyramid

import frs_kernels
from frs_kernels import Distiller, FSRLoss, fsr_loss, masked_imitation_loss
from frs_kernels.distill import GradientShare

RANKS = 2


def launch(work: Callable[..., Any], folder: Path, *args: Any, ranks: int = RANKS) -> list[Any]:
    """Run `work` in processes of one group and return what each of them returned."""
    torch.multiprocessing.spawn(_process, (work, folder, args, ranks), nprocs=ranks, join=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _process(rank: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...], ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    os._exit(0)  # past the interpreter's end, which a thread of gloo's may outlive and then aborts the process


def half(rank: int, levels: list[Tensor]) -> list[Tensor]:
    """This rank's images, of two."""
    return [v.detach().chunk(RANKS)[rank].clone() for v in levels]


def own_gradients(rank: int, pyramids: list[Pyramid], backend: str, choices: list[dict[str, Any]]) -> list[Any]:
    """The loss of this rank's own pyramid over the mean mass, and its gradients, for each choice of options."""
    mine = pyramids[rank].map(torch.clone)
    results = []
    for options in choices:
        loss = fsr_loss(*mine.inputs, process_group=dist.group.WORLD, backend=backend, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, mine.student)))
    return results


def refused(rank: int, p: Pyramid, limit: timedelta, until: Path | None = None) -> tuple[str, float]:
    """A step in which rank 1 is given features of other channels than its teacher's: what each is told, and when.

    Rank 1 ends then, or lives on `until` there is a file, which the other makes.
    """
    group = dist.new_group(timeout=limit)  # not the first group's: that one waits for processes that start slowly
    wrong = [v[:, 1:] for v in p.s or []] if rank == 1 else p.s
    dist.barrier()
    started = time.monotonic()
    try:
        fsr_loss(wrong, p.t, p.x, p.z, process_group=group)
    except (RuntimeError, ValueError) as error:
        told = str(error), time.monotonic() - started
        if until and rank == 0:
            until.touch()
        while until and not until.exists():
            time.sleep(0.05)
        return told
    raise AssertionError("a step that cannot be")


def averaged_gradients(rank: int, p: Pyramid, backend: str, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """This rank's share of the joint batch's loss and gradients, for each choice of options."""
    mine = Pyramid(*(half(rank, levels) for levels in p.inputs)).map(torch.clone)
    results = []
    for options in choices:
        loss = fsr_loss(*mine.inputs, process_group=dist.group.WORLD, backend=backend, **options)
        local = fsr_loss(*mine.inputs, backend=backend, **options).detach()
        grads = torch.autograd.grad(loss, mine.student)
        total = loss.detach().clone()
        dist.all_reduce(total)
        results.append({"loss": total / RANKS, "local": local, "grads": [g / RANKS for g in grads]})
    return results


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.neck = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 7, 1)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        feats = self.neck(images)
        return [feats], [self.head(feats)]


def ddp_gradients(rank: int, images: Tensor, t: list[Tensor], z: list[Tensor], backend: str) -> list[Tensor]:
    """A step of DistributedDataParallel: the gradients it leaves in the parameters."""
    model = nn.parallel.DistributedDataParallel(Model())
    distil = FSRLoss(0.5, 0.1, process_group=dist.group.WORLD, backend=backend)
    feats, logits = model(images.chunk(RANKS)[rank])
    loss = distil(feats, half(rank, t), logits, half(rank, z))
    assert isinstance(loss, Tensor)
    loss.backward()
    return [v.grad.clone() for v in model.parameters() if v.grad is not None]


def masked_losses(rank: int, p: Pyramid, mask: list[Tensor]) -> float:
    mine, teachers = (half(rank, levels) for levels in (p.s or [], p.t or []))
    group = dist.group.WORLD
    return masked_imitation_loss(mine, teachers, half(rank, mask), process_group=group, backend="torch").item()


def shared_weight(rank: int) -> float:
    """After two updates over both ranks' gradients, of the second of which this rank may have seen nothing."""
    share = GradientShare(0.3)
    for step in range(2):
        x = torch.ones(3, requires_grad=True)
        if step == 0 or rank == 0:
            ((rank + 2) * x.sum() + share.weight * share.watch([x])[0].sum()).backward()
        share.update(process_group=dist.group.WORLD)
    return share.weight.item()


def make_distiller(images: Tensor, returns: str = "losses", group: Any = None) -> Distiller:
    """The same in every process."""
    torch.manual_seed(0)
    distiller = Distiller(
        Detector(returns=returns), Detector(channels=9), feats="neck", logits="head.cls", warmup=0,
        normalizer="total_mass", process_group=group, example=(images[:1],),
    )  # fmt: skip
    distiller.student.head.box.requires_grad_(False)
    return distiller


def distilled(distiller: Distiller, returned: Any) -> Tensor:
    """The distiller's own losses, in the dict that was returned or apart."""
    if isinstance(returned, dict):
        return sum((returned[name] for name in returned if "frs" in name), start=torch.zeros(()))
    return distiller.loss()


def distiller_gradients(rank: int, images: Tensor, returns: str) -> list[Tensor]:
    """A step of DistributedDataParallel around a Distiller, the losses in its dict or apart."""
    distiller = make_distiller(images, returns, dist.group.WORLD)
    ddp = nn.parallel.DistributedDataParallel(distiller)
    distilled(distiller, ddp(images.chunk(RANKS)[rank])).backward()
    return [p.grad.clone() for p in distiller.parameters() if p.requires_grad]


STEPS = 3


def assert_of_one_process(
    ranks: list[dict[str, Any]], distiller: Distiller, losses: list[Tensor], grads: list[Tensor]
) -> None:
    """What ranks found is what one process did: the mean of their losses a step, the last gradients, the weights."""
    for step, loss in enumerate(losses):
        mean = sum(found["losses"][step] for found in ranks) / len(ranks)
        assert relative(mean, loss) <= 1e-6
    for found in ranks:
        assert all(relative(mine, grad) <= 1e-5 for mine, grad in zip(found["grads"], grads, strict=True))
        pairs = zip(found["weights"], distiller.parameters(), strict=True)
        assert all(relative(mine, weight.detach()) <= 1e-5 for mine, weight in pairs)


def replicated(rank: int, batches: list[Tensor]) -> dict[str, Any]:
    """The same steps of DDP."""
    distiller = make_distiller(batches[0], group=dist.group.WORLD)
    ddp = nn.parallel.DistributedDataParallel(distiller)
    losses, grads = descend(distiller, batches[rank], lambda inner, x: distilled(inner, ddp(x)))
    return {"losses": losses, "grads": grads, "weights": [p.detach() for p in distiller.parameters()]}


def descend(
    distiller: Distiller, images: Any, loss_of: Callable[[Distiller, Any], Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of some steps, and the gradients of the last."""
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(distiller, images) if loss_of else distilled(distiller, distiller(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.grad for p in trained if p.grad is not None]


def sharded(rank: int, batches: list[Tensor], returns: str, parts: list[str]) -> dict[str, Any]:
    """Steps of FSDP2 around a Distiller, whose `parts` are sharded on their own: losses, gradients and weights."""
    distiller = make_distiller(batches[0], returns, dist.group.WORLD)
    for part in parts:
        fully_shard(distiller.get_submodule(part))
    fully_shard(distiller)
    losses, grads = descend(distiller, batches[rank])
    assert all(isinstance(p, DTensor) for p in distiller.parameters())
    assert not any(isinstance(p, DTensor) for p in distiller.teacher.parameters())
    weights = [p.detach().full_tensor() for p in distiller.parameters()]
    return {"losses": losses, "grads": [g.full_tensor() for g in grads], "weights": weights}


def names_of_the_pages(batch: Tensor) -> dict[str, Any]:
    """What the blocks of README.md and docs/guide.md take for granted; the same weights at every call."""
    torch.manual_seed(0)
    student, teacher = Loop(6), Loop(9)
    return {
        "torch": torch, "nn": nn, **vars(frs_kernels), "student": student, "teacher": teacher.eval(), "images": batch,
        "targets": batch, "loader": [(batch, batch)] * 2, "student_channels": 6, "teacher_channels": 9,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    }  # fmt: skip


def run_blocks(rank: int, blocks: list[str]) -> dict[str, list[Tensor]]:
    """Blocks of a page, one after another, on this rank's half of four images: weights and gradients afterwards."""
    names = names_of_the_pages(images(n=2 * RANKS).chunk(RANKS)[rank])
    for block in blocks:
        exec(block, names)
    found: dict[str, list[Tensor]] = {"weights": [], "grads": []}
    for p in names["model"].parameters():
        if p.requires_grad:
            found["weights"].append(_whole(p.detach()))
            found["grads"].append(torch.zeros(0) if p.grad is None else _whole(p.grad))
    return found


def _whole(v: Tensor) -> Tensor:
    return v.full_tensor() if isinstance(v, DTensor) else v
