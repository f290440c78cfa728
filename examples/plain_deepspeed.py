"""A training loop of DeepSpeed ZeRO. Three lines, marked "svite_scale", make its training sparse.

deepspeed --num_gpus 2 examples/plain_deepspeed.py [--zero-stage 3]
"""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import digits
import svite_scale


def train(epochs: int, zero_stage: int) -> None:
    """Trains a sparse ViT from scratch, and prints its accuracy on digits that it hasn't seen."""
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "zero_optimization": {"stage": zero_stage},
        "gradient_clipping": 0.0,  # stated, because DeepSpeed clips by default
        "steps_per_print": 10**9,
    }
    model = digits.build_model()
    # svite_scale, 1 of 3: before an engine wraps the model.
    svite_scale.sparsify(model, density=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    train_data, test_data = digits.load()
    sampler: DistributedSampler = DistributedSampler(train_data, shuffle=True, drop_last=True)
    loader = DataLoader(train_data, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    # svite_scale, 2 of 3: after it has wrapped the model.
    topology = svite_scale.attach(engine, total_steps=epochs * len(loader), update_every=20)
    stage, ranks = engine.zero_optimization_stage(), dist.get_world_size()
    say(f"{type(engine).__name__}, ZeRO stage {stage}, on {ranks} ranks, {engine.device.type}")

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        losses, updates = [], []
        for images, labels in loader:
            loss = F.cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            # svite_scale, 3 of 3: after each optimizer step.
            updates.append(topology.step())
            losses.append(loss.detach())
        loss = summed(torch.stack(losses).mean()) / dist.get_world_size()
        say(f"epoch {epoch + 1}: loss {loss:.4f}, {digits.summary(updates)}")
    say(f"test accuracy {accuracy(engine, test_data):.1%} on {len(test_data)} digits")


@torch.no_grad()
def accuracy(engine: Any, data: TensorDataset) -> float:
    """Returns the fraction of recognised samples. Each rank takes its part in one batch, so all do one forward."""
    engine.eval()
    images, labels = data[dist.get_rank() :: dist.get_world_size()]
    correct = engine(images.to(engine.device)).argmax(dim=1) == labels.to(engine.device)
    return float(summed(correct.sum())) / len(data)


def summed(tensor: Tensor) -> Tensor:
    """Returns the sum over all ranks. A collective."""
    dist.all_reduce(tensor)
    return tensor


def say(line: str) -> None:
    """Prints a line, on one rank only."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--local_rank", help="added by the deepspeed launcher; not used, because the environment has it too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    train(arguments.epochs, arguments.zero_stage)
    # Meanwhile gloo's threads release their last tensors; after Python's end this would abort (pytorch/pytorch#179291).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
