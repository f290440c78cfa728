"""A training loop of plain PyTorch and FSDP2. Three lines, marked "svite_scale", make its training sparse.

torchrun --nproc-per-node 2 examples/plain_fsdp2.py
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import digits
import svite_scale


def train(epochs: int, device: torch.device) -> None:
    """Trains a sparse ViT from scratch, and prints its accuracy on digits that it hasn't seen."""
    train_data, test_data = digits.load()
    sampler: DistributedSampler = DistributedSampler(train_data, shuffle=True, drop_last=True)
    loader = DataLoader(train_data, batch_size=32, sampler=sampler, drop_last=True)

    model = digits.build_model()
    # svite_scale, 1 of 3: before an engine wraps the model.
    svite_scale.sparsify(model, density=0.3)
    model.to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    # svite_scale, 2 of 3: after it has wrapped the model, and the optimizer is built.
    topology = svite_scale.attach(model, optimizer, total_steps=epochs * len(loader), update_every=20)
    say(f"{type(model).__name__} on {dist.get_world_size()} ranks, {device.type}")

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        losses, updates = [], []
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # svite_scale, 3 of 3: after each optimizer step.
            updates.append(topology.step())
            losses.append(loss.detach())
        loss = summed(torch.stack(losses).mean()) / dist.get_world_size()
        say(f"epoch {epoch + 1}: loss {loss:.4f}, {digits.summary(updates)}")
    say(f"test accuracy {accuracy(model, test_data, device):.1%} on {len(test_data)} digits")


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, device: torch.device) -> float:
    """Returns the fraction of recognised samples. Each rank takes its part in one batch, so all do one forward."""
    model.eval()
    images, labels = data[dist.get_rank() :: dist.get_world_size()]
    correct = model(images.to(device)).argmax(dim=1) == labels.to(device)
    return float(summed(correct.sum())) / len(data)


def summed(tensor: Tensor) -> Tensor:
    """Returns the sum over all ranks. A collective."""
    dist.all_reduce(tensor)
    return tensor


def say(line: str) -> None:
    """Prints a line, on one rank only."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def start() -> torch.device:
    """Joins the process group, and returns this rank's device: its GPU, or the CPU of a machine without one."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    device = start()
    train(arguments.epochs, device)
    # Meanwhile gloo's threads release their last tensors; after Python's end this would abort (pytorch/pytorch#179291).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
