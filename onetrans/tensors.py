"""Tensors in a safetensors file, written and read one after the other: a large table is never held twice.

The library's own ``save`` and ``load`` make the whole file in memory, which for a
training is weights and optimizer state once more.  The layout is the published one
(https://github.com/huggingface/safetensors): eight bytes with the length of a JSON
header, the header, then the tensors' bytes end to end, little-endian.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import xxhash
from torch import Tensor

from onetrans import storage
from onetrans.errors import BadDataError

if sys.byteorder != "little":
    raise ImportError("tensors are written as they lie in memory, which must be little-endian")

_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK_BYTES = 8 << 20
_LARGEST_HEADER = 100 << 20


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors to a file, at once or not at all; return its size in ``bytes`` and its hash, ``xxh3_128``."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with storage.writing(path) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for tensor in tensors.values():
            content = _bytes(tensor.detach().cpu().contiguous())
            for start in range(0, len(content), _BLOCK_BYTES):
                block = content[start : start + _BLOCK_BYTES]
                digest.update(block)
                file.write(block)
    return {"bytes": 8 + len(text) + end, "xxh3_128": digest.hexdigest()}


def read_tensors(path: str, written: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file on the CPU; ``written`` is what :func:`write_tensors` returned.

    Raises:
        FileNotFoundError: if it is not there.
        BadDataError: if it is damaged: cut short, of another size or hash, or no such file.
    """
    filesystem, inner = storage.open_filesystem(path)
    digest = xxhash.xxh3_128()
    tensors: dict[str, Tensor] = {}
    with filesystem.open_input_stream(inner) as file:

        def read(content: memoryview) -> None:
            for start in range(0, len(content), _BLOCK_BYTES):
                block, got = content[start : start + _BLOCK_BYTES], 0
                while got < len(block):
                    more = file.readinto(block[got:])
                    if not more:
                        raise BadDataError(f"{path} is damaged: it is cut short")
                    got += more
                digest.update(block)

        size = bytearray(8)
        read(memoryview(size))
        length = int.from_bytes(size, "little")
        if length > _LARGEST_HEADER:
            raise BadDataError(f"{path} is damaged: its header would have {length:,} bytes")
        text = bytearray(length)
        read(memoryview(text))
        total = 8 + length
        for name, entry in _header(path, bytes(text)).items():
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            content = _bytes(tensor)
            if entry["data_offsets"] != [total - 8 - length, total - 8 - length + len(content)]:
                raise BadDataError(f"{path} is damaged: tensor {name} is not where its size says")
            read(content)
            total += len(content)
            tensors[name] = tensor
        rest = len(file.read(1))
    if rest or (written is not None and written["bytes"] != total):
        raise BadDataError(f"{path} is damaged: it has not the size that was written")
    if written is not None and written["xxh3_128"] != digest.hexdigest():
        raise BadDataError(f"{path} is damaged: its content is not what was written")
    return tensors


def check_tensors(path: str, written: Mapping[str, Any]) -> None:
    """Refuse a file that :func:`write_tensors` did not leave like this; it is read once, a block at a time.

    Raises:
        FileNotFoundError: if it is not there.
        BadDataError: if its size or hash is another.
    """
    filesystem, inner = storage.open_filesystem(path)
    digest, total = xxhash.xxh3_128(), 0
    with filesystem.open_input_stream(inner) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            total += len(block)
    if total != written["bytes"]:
        raise BadDataError(f"{path} is damaged: it has {total:,} bytes, {written['bytes']:,} were written")
    if digest.hexdigest() != written["xxh3_128"]:
        raise BadDataError(f"{path} is damaged: its content is not what was written")


def _header(path: str, text: bytes) -> dict[str, dict[str, Any]]:
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        for entry in entries.values():
            _DTYPES[entry["dtype"]], prod(entry["shape"]), entry["data_offsets"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadDataError(f"{path} is damaged: its header cannot be read ({error})") from error
    return dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
