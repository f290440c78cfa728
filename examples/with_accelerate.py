"""A training loop of Hugging Face Accelerate. Three lines, marked "svite_scale", make its training sparse.

accelerate launch --multi_gpu --num_processes 2 examples/with_accelerate.py

The same command serves a machine without a GPU. Don't use ``--cpu`` in place of ``--multi_gpu``: it silently starts one
process.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.utils.data import DataLoader

import digits
import svite_scale


def train(epochs: int, accelerator: Accelerator) -> None:
    """Trains a sparse ViT from scratch, and prints its accuracy on digits that it hasn't seen."""
    train_data, test_data = digits.load()
    train_loader, test_loader = accelerator.prepare(
        DataLoader(train_data, batch_size=32, shuffle=True, drop_last=True), DataLoader(test_data, batch_size=100)
    )

    model: nn.Module = digits.build_model()
    # svite_scale, 1 of 3: before an engine wraps the model.
    svite_scale.sparsify(model, density=0.3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=5e-3))
    # svite_scale, 2 of 3: after it has wrapped the model and the optimizer.
    topology = svite_scale.attach(model, optimizer, total_steps=epochs * len(train_loader), update_every=20)
    accelerator.print(f"{type(model).__name__} on {accelerator.num_processes} ranks, {accelerator.device.type}")

    for epoch in range(epochs):
        train_loader.set_epoch(epoch)
        losses, updates = [], []
        for images, labels in train_loader:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            # svite_scale, 3 of 3: after each optimizer step; under accumulate(), only "if accelerator.sync_gradients".
            updates.append(topology.step())
            losses.append(loss.detach())
        loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.4f}, {digits.summary(updates)}")
    recognised = accuracy(model, test_loader, accelerator)
    accelerator.print(f"test accuracy {recognised:.1%} on {len(test_data)} digits")


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Returns the fraction of recognised samples. Gathering leaves out the samples that only fill up the last batch."""
    model.eval()
    batches = [accelerator.gather_for_metrics(model(images).argmax(dim=1) == labels) for images, labels in loader]
    return float(torch.cat(batches).double().mean())


def start() -> Accelerator:
    """Returns Accelerate with FSDP2 on GPUs. On the CPU it uses DDP, because it silently ignores an FSDP plugin there."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return Accelerator(cpu=True)
    units = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Block"]}
    return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **units))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    accelerator = start()
    train(arguments.epochs, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
