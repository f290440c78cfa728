"""The form ``packed``: active values and bitmasks, in a file whose size falls with density."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svite_scale.errors import ExportError
from svite_scale.export.form import WEIGHTS, Description, Export, Notes, empty_model, load_tensors, read_tensors
from svite_scale.sparsity.bitmask_layout import decode_state_dict, encode_state_dict
from svite_scale.sparsity.dense import copied, to_dense
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.mask import Mask


def write(export: Export, folder: Path) -> Notes:
    """Writes ``model.safetensors``, with the weights of all sparse layers in the sparse-bitmask layout."""
    tensors = encode_state_dict(to_dense(export.model).state_dict(), active_weights(export.model))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return Notes(usage=USAGE)


def read(folder: Path, description: Description) -> nn.Module:
    """Returns the dense model, with zeros where inactive, and with its token selectors."""
    model, path = empty_model(description), folder / WEIGHTS
    try:
        state, active = decode_state_dict(read_tensors(path))
    except ValueError as error:
        raise ExportError(f"{path} is damaged ({error}); export the model again") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in active.keys() & shapes.keys():
        if state[name].numel() == shapes[name].numel():
            state[name] = state[name].view(shapes[name])
    load_tensors(model, state, path)
    return model


def active_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns which elements of the dense model's weights are active in a sparse model.

    Returns:
        By the name of a weight in the dense model's state dict, bool of its shape; layers that aren't sparse are left out.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    ones = {
        id(parameter): nn.Parameter(torch.ones_like(parameter))
        for layer in layers.values()
        for parameter in layer.parameters()
        if not isinstance(parameter, Mask)
    }
    # Ones where the model has weights, heads and neurons, and zeros elsewhere.
    marked = to_dense(copied(model, dict(ones)))
    return {
        f"{name}.{inner}": parameter.detach() != 0
        for name in layers
        for inner, parameter in marked.get_submodule(name).named_parameters()
        if parameter.dim() > 1
    }


USAGE = """\
`model.safetensors` holds the weights of sparse layers in the sparse-bitmask layout: the active values, and one bit for each
weight. With svite_scale:

```python
from pathlib import Path

from svite_scale.export.read import read_export

model = read_export(Path("FOLDER")).model  # dense, zeros where inactive
```

With numpy alone, a weight `M.weight`:

```python
import numpy as np
from safetensors.numpy import load_file

tensors = load_file("FOLDER/model.safetensors")
rows, columns = tensors["M.shape"]
weight = np.zeros((rows, columns), tensors["M.compressed"].dtype)
active = np.unpackbits(tensors["M.bitmask"], axis=1, count=columns, bitorder="little").astype(bool)
weight[active] = tensors["M.compressed"]
```

A convolution's weight is stored as the matrix [out, in * height * width]. `M.row_offsets` is the number of active values
before each row. All other tensors are stored as they are.
"""
