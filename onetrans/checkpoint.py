"""Checkpoints: everything that decides the rest of a training, in two files, whole or not at all.

``step-<n>-<random>.safetensors`` holds every tensor (weights, optimizer state,
generator state), ``checkpoint.json`` the rest, the name of the tensor file, its
size and its hash, and a hash of itself.  The JSON file is replaced last and at
once, so a reader finds the earlier checkpoint or the new one; tensor files it does
not name are leftovers and are removed.  Tensors are written from where they lie (:mod:`onetrans.tensors`):
a checkpoint takes no memory of its own.  No pickle is read or written.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from onetrans import storage
from onetrans.errors import BadConfigError, BadDataError
from onetrans.loader import Cursor
from onetrans.optim import Optimizers
from onetrans.tensors import check_tensors, read_tensors, write_tensors

_INDEX = "checkpoint.json"
_FORMAT = 1
_DIGEST = "xxh3_128"
"""In the JSON file: the hash of all the rest of it; checkpoints of earlier versions have none."""
_MODEL, _OPTIMIZERS, _GENERATORS = "model", "optimizers", "generators"


class DamagedCheckpointError(BadConfigError):
    """A checkpoint cannot be read as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A training at the end of some step."""

    step: int
    """Optimizer steps done."""
    cursor: Cursor
    """The next batch."""
    progress: Mapping[str, Any]
    """What the training loop keeps besides: samples, seconds, ...; plain data."""
    tensors: Mapping[str, Tensor]
    """All tensors, by path."""
    trees: Mapping[str, Any]
    """Nested state whose tensors are references into ``tensors``."""

    @classmethod
    def capture(
        cls, model: nn.Module, optimizers: Optimizers, step: int, cursor: Cursor, progress: Mapping[str, Any]
    ) -> Checkpoint:
        """Take the state of a training, its own tensors and no copies of them: save it before the next step."""
        generators: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators.update({f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
        tensors: dict[str, Tensor] = {}
        trees = {
            name: _take_out(tree, name, tensors)
            for name, tree in (
                (_MODEL, dict(model.state_dict())),
                (_OPTIMIZERS, optimizers.state_dict()),
                (_GENERATORS, generators),
            )
        }
        return cls(step, cursor, dict(progress), tensors, trees)

    def restore(self, model: nn.Module, optimizers: Optimizers, *, generators: bool) -> None:
        """Put weights and optimizer state back, and the random generators too if asked.

        Raises:
            BadConfigError: if the state belongs to another model or optimizer.
        """
        try:
            model.load_state_dict(self._tree(_MODEL))
            optimizers.load_state_dict(self._tree(_OPTIMIZERS))
        except (RuntimeError, ValueError, KeyError) as error:
            raise BadConfigError(f"the checkpoint of step {self.step} belongs to another model: {error}") from error
        if generators:
            states = self._tree(_GENERATORS)
            torch.set_rng_state(states["cpu"])
            if torch.cuda.is_available():
                for number in range(torch.cuda.device_count()):
                    if f"cuda:{number}" in states:
                        torch.cuda.set_rng_state(states[f"cuda:{number}"], number)

    def _tree(self, name: str) -> Any:
        return _put_back(self.trees[name], self.tensors)

    def save(self, folder: str) -> None:
        """Write the checkpoint into ``folder``, replacing the one that is there."""
        # A name of its own also where the step is the same: nothing that the index names is ever written to.
        name = f"step-{self.step}-{uuid.uuid4().hex[:8]}.safetensors"
        written = write_tensors(storage.join(folder, name), self.tensors)
        index = {
            "format": _FORMAT,
            "step": self.step,
            "tensors": name,
            "written": written,
            "cursor": self.cursor.to_dict(),
            "progress": self.progress,
            "trees": self.trees,
        }
        storage.write_json(storage.join(folder, _INDEX), {**index, _DIGEST: _digest(index)})
        # Earlier ones, and what a process that was killed while it wrote has left.
        for file in (*storage.list_files(folder, ".safetensors"), *storage.list_files(folder, ".tmp")):
            if not file.endswith(f"/{name}"):
                storage.delete_file(file)

    @classmethod
    def load(cls, folder: str) -> Checkpoint | None:
        """Read the checkpoint in ``folder``; None if there is none.

        Raises:
            DamagedCheckpointError: if it is damaged or of another format.
        """
        data = _read_index(folder)
        if data is None:
            return None
        path = storage.join(folder, data["tensors"])
        try:
            tensors = read_tensors(path, data.get("written"))
        except (FileNotFoundError, BadDataError) as error:
            raise DamagedCheckpointError(f"checkpoint {path} is missing or damaged ({error})") from error
        return cls(data["step"], Cursor.from_dict(data["cursor"]), data["progress"], tensors, data["trees"])

    @staticmethod
    def check(folder: str) -> None:
        """Refuse a checkpoint that :meth:`load` would refuse, without holding it in memory.

        Raises:
            DamagedCheckpointError: if it is damaged, of another format, or not there.
        """
        data = _read_index(folder)
        if data is None:
            raise DamagedCheckpointError(f"there is no checkpoint in {folder}")
        path = storage.join(folder, data["tensors"])
        try:
            if "written" in data:
                check_tensors(path, data["written"])
            else:
                read_tensors(path)
        except (FileNotFoundError, BadDataError) as error:
            raise DamagedCheckpointError(f"checkpoint {path} is missing or damaged ({error})") from error


def _read_index(folder: str) -> dict[str, Any] | None:
    index = storage.join(folder, _INDEX)
    if not storage.exists(index):
        return None
    try:
        data = storage.read_json(index)
    except (BadConfigError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"{index} is damaged ({error})") from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != _FORMAT:
        raise DamagedCheckpointError(f"{index} has format {found}, expected {_FORMAT}")
    digest = data.pop(_DIGEST, None)
    if digest is not None and digest != _digest(data):
        raise DamagedCheckpointError(f"{index} is damaged: its content is not what was written")
    return data


def _digest(index: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(index, sort_keys=True, default=str).encode())


# Nested state as JSON: a tensor becomes {"tensor": path}, a mapping {"map": [[key, value], ...]} so that the
# whole-number keys of an optimizer's state stay numbers.


def _take_out(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"map": [[key, _take_out(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take_out(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint: {path} is of type {type(value).__name__}, which has no plain form")


def _put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _put_back(item, tensors) for key, item in content}
    return [_put_back(item, tensors) for item in content]
