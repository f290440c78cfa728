"""Writing a run's model into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from svite_scale.errors import ConfigError, ExportError
from svite_scale.export.form import DESCRIPTION, Export, describe, write_description
from svite_scale.export.formats import OnnxOptions
from svite_scale.export.model_card import write_card
from svite_scale.export.read import FORMS
from svite_scale.saved_run import SavedRun, load_model
from svite_scale.tracking.progress import Progress


def export_run(
    run: SavedRun,
    format: str,
    out: Path,
    *,
    ema: bool = False,
    license: str | None = None,
    onnx: OnnxOptions | None = None,
    show_progress: bool = False,
) -> Path:
    """Exports the model of a run's checkpoint. The folder appears when it is complete.

    Args:
        run: to export.
        format: one of :data:`~svite_scale.export.formats.FORMATS`.
        out: the folder to write; it may exist if it is empty.
        ema: take the moving average of the weights.
        license: of the model, for its card: an identifier such as ``apache-2.0``.
        onnx: options of the form ``onnx``.
        show_progress: on stderr.

    Returns:
        The folder.

    Raises:
        ConfigError: there is no such format, or its options don't fit; or the model can't be built.
        ExportError: the folder isn't empty or can't be written, or the model has no such form.
        CheckpointError: the checkpoint is damaged, or has no average.
    """
    if format not in FORMS:
        raise ConfigError("--format", format, "is no form of a model", f"use one of {', '.join(FORMS)}")
    if onnx is not None and format != "onnx":
        raise ConfigError("--format", format, "takes no options of onnx", "leave them out, or use --format onnx")
    with _new_folder(out) as folder, Progress("export", 3, "parts", enabled=show_progress) as progress:
        description = describe(run, format, ema=ema, license=license)
        export = Export(run, load_model(run, ema=ema), description, onnx or OnnxOptions())
        progress.advance()
        notes = FORMS[format].write(export, folder)
        progress.advance()
        write_description(description, folder)
        write_card(export, notes, folder)
        progress.advance()
    return out


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Gives an empty folder on the disk of ``out``. At the end it becomes ``out``, or its files move there if ``out`` exists,
    ``export.json`` last. It is removed on an error.

    Raises:
        ExportError: ``out`` isn't empty, or can't be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and isn't an empty folder; give --out a new one, or remove it")
    target = Path(os.path.realpath(out))
    exists = target.exists()
    parent = target if exists else target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=parent, prefix=".export-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary) / "export"  # the temporary one is for its owner alone, this one as the umask says
            folder.mkdir()
            yield folder
            for file in folder.iterdir():
                file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
            if not exists:
                folder.rename(target)
            else:
                for file in sorted(folder.iterdir(), key=lambda file: file.name == DESCRIPTION):
                    file.rename(target / file.name)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"can't write to {out} ({error}); give --out a folder that can be written") from error
