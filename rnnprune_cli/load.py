"""File → :class:`LoadedModel`, by what the path holds."""

from __future__ import annotations

from pathlib import Path

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import LoadedModel

TENSORFLOW_SUFFIXES = (".keras", ".h5", ".hdf5")


def load(path: Path, signature: str | None = None, threads: int = 1) -> LoadedModel:
    """Loads a model.

    Args:
        path: An ``.onnx`` file, a SavedModel directory, or a ``.keras`` or ``.h5`` file.
        signature: Signature of a SavedModel; None for the default one.
        threads: Threads for TensorFlow, which takes them once per process.

    Raises:
        RnnpruneError: If it cannot be read.
        UsageError: If ``--signature`` was given for a model that has none.
    """
    if not path.exists():
        raise RnnpruneError(f"{path} does not exist", "check the path of the model")
    if path.is_dir() or path.suffix.lower() in TENSORFLOW_SUFFIXES:
        from rnnprune_cli.tensorflow_model import load as load_tensorflow

        return load_tensorflow(path, signature=signature, threads=threads)
    if signature is not None:
        raise UsageError("--signature is for SavedModels", f"{path} has none; leave it away")
    from rnnprune_cli.onnx_model import OnnxModel

    try:
        return OnnxModel(path)
    except (PermissionError, IsADirectoryError) as error:
        raise RnnpruneError(
            f"{path} cannot be read: {error.strerror}", "check its rights"
        ) from error
    except RecursionError as error:
        raise RnnpruneError(
            f"{path} nests its graphs too deeply", "simplify the model and export it again"
        ) from error


def model_files(path: Path) -> tuple[Path, ...]:
    """Returns all files of a model, as :attr:`LoadedModel.files` has them, without loading it.

    Raises:
        RnnpruneError: If it is no model.
    """
    if path.is_dir():
        if not (path / "saved_model.pb").is_file():
            raise RnnpruneError(f"{path} holds no SavedModel", "check the path of the model")
        return tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    if path.suffix.lower() in TENSORFLOW_SUFFIXES:
        return (path,)
    from rnnprune_cli.onnx_file import external_files, read_proto

    return (path, *external_files(read_proto(path), path))
