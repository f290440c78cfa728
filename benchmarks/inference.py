"""Size, time and logits of a sparse model in every exported form, beside its dense twin.

    python benchmarks/inference.py [--run RUN] [--threads 1 2] [--batch-sizes 1 8] [--rounds 20]

Without ``--run`` the model is DeiT-Small at 224 px with 60% of its heads and neurons, 50% of its tokens, and random weights.
Every form is written into a folder and read back. All of them, in PyTorch or onnxruntime, then run alternately in one process,
so that other load on the machine affects all alike. Times are medians; a speedup is the median of the ratios of the dense
twin's time to the form's within a round. The twin of a form that onnxruntime runs is the dense ONNX model, otherwise the dense
model in PyTorch. Sizes are of all files that the form writes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.machine import describe_machine
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.errors import ExportError
from svite_scale.evaluation.timing import alternate, ratio
from svite_scale.export import onnx_form
from svite_scale.export.form import Export, describe
from svite_scale.export.quantization import quantize
from svite_scale.export.read import FORMS
from svite_scale.models.options import ModelConfig, StructuredConfig, TokensConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.saved_run import SavedRun, load_model, read_run

SPARSITY = SparsityConfig(structured=StructuredConfig(heads=0.6, neurons=0.6), tokens=TokensConfig(keep=0.5))
INT8 = "onnx int8"


@dataclass
class Row:
    """A model in a form.

    Attributes:
        folder: of its files.
        form: its name in ``FORMS``.
        export: what was written.
    """

    folder: Path
    form: str
    export: Export

    @property
    def megabytes(self) -> float:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 1e6

    def read(self) -> nn.Module:
        """Returns the model. In onnxruntime it has the threads that torch has now."""
        return FORMS[self.form].read(self.folder, self.export.description)

    def difference(self, images: Tensor) -> float:
        """Returns the largest difference of the logits from those of the sparse model in PyTorch."""
        with torch.inference_mode():
            return (self.read()(images) - self.export.model(images)).abs().max().item()


def random_run() -> tuple[SavedRun, nn.Module]:
    """Returns a run that doesn't exist, and its model with random weights."""
    config = Config(run_dir="unused", model=ModelConfig(name="deit_small_patch16_224"), sparsity=SPARSITY)
    return SavedRun(Path("unused"), config, Path("unused"), 0, [], []), build_sparse(config.model, SPARSITY, 0).model.eval()


def dense_twin(run: SavedRun) -> tuple[SavedRun, nn.Module]:
    """Returns the same run with a dense model, and that model with random weights."""
    config = replace(run.config, sparsity=SparsityConfig())
    return replace(run, config=config), build_sparse(config.model, config.sparsity, 0).model.eval()


def rows_of(name: str, run: SavedRun, model: nn.Module, forms: list[str], folder: Path) -> dict[str, Row]:
    """Writes a model in every form that it has, and in int8. Returns the rows by their names."""
    rows = {}
    for form in forms:
        export = Export(run, model, describe(run, form))
        row = Row(folder / name / form, form, export)
        row.folder.mkdir(parents=True)
        try:
            FORMS[form].write(export, row.folder)
        except ExportError as error:
            print(f"{name}: {error}")
            continue
        rows[f"{name}, {form}"] = row
    row = Row(folder / name / INT8, "onnx", rows[f"{name}, onnx"].export)
    row.folder.mkdir()
    quantize(
        rows[f"{name}, onnx"].folder / onnx_form.FILE, row.folder / onnx_form.FILE, row.export.example, external_data=False
    )
    return rows | {f"{name}, {INT8}": row}


def measure(rows: dict[str, Row], batch_size: int, arguments: argparse.Namespace) -> None:
    """Times all rows, and prints them."""
    config = next(iter(rows.values())).export.run.config.model
    images = torch.randn(batch_size, config.in_channels, config.image_size, config.image_size)
    models = {name: row.read() for name, row in rows.items()}
    with torch.inference_mode():
        seconds = alternate({name: lambda each=each: each(images) for name, each in models.items()}, arguments.rounds)
    for name, row in rows.items():
        twin = "dense, onnx" if row.form == "onnx" else "dense, timm"
        speedup = 1 / ratio(seconds[name], seconds[twin])
        print(f"{name:24} {batch_size:5} {statistics.median(seconds[name]) * 1e3:10.2f} {speedup:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    run, model = random_run() if arguments.run is None else (read := read_run(arguments.run), load_model(read))
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of("dense", *dense_twin(run), ["timm", "onnx"], Path(folder))
        rows |= rows_of("sparse", run, model, list(FORMS), Path(folder))
        print(f"\n{'':24} {'MB':>8} {'difference of logits':>22}")
        for name, row in rows.items():
            print(f"{name:24} {row.megabytes:8.2f} {row.difference(row.export.example):22.1e}", flush=True)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            print(f"\n{f'{threads} threads':24} {'batch':>5} {'ms':>10} {'speedup':>8}")
            for batch_size in arguments.batch_sizes:
                measure(rows, batch_size, arguments)


if __name__ == "__main__":
    main()
