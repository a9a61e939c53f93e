"""Tensors written and read one after the other: the file is safetensors', damage is found, nothing is held twice."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from onetrans.errors import BadDataError
from onetrans.tensors import check_tensors, read_tensors, write_tensors


def some():
    torch.manual_seed(0)
    return {
        "table": torch.randn(50, 7),
        "turned": torch.randn(6, 4).t(),
        "half": torch.randn(3).to(torch.bfloat16),
        "count": torch.arange(5, dtype=torch.int32),
        "seen": torch.tensor([True, False]),
        "one": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "state": torch.get_rng_state(),
    }


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    written = write_tensors(str(tmp_path / "a"), some())
    assert written["bytes"] == os.path.getsize(tmp_path / "a")
    assert_equal(load_file(tmp_path / "a"), some())
    assert_equal(read_tensors(str(tmp_path / "a"), written), some())
    check_tensors(str(tmp_path / "a"), written)
    save_file({name: tensor.contiguous() for name, tensor in some().items()}, tmp_path / "b", {"made": "elsewhere"})
    assert_equal(read_tensors(str(tmp_path / "b")), some())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "cut short"),
        (lambda data: data[:5], "cut short"),
        (lambda data: data + b"x", "not the size that was written"),
        (lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], "its content is not what was written"),
        (lambda data: data[:20] + b"#" + data[21:], "its header cannot be read"),
        (lambda data: b"\xff" * 8 + data[8:], "its header would have"),
    ],
)
def test_damage_is_found(tmp_path, damage, message):
    path = tmp_path / "a"
    written = write_tensors(str(path), some())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadDataError, match=f"a is damaged: .*{message}"):
        read_tensors(str(path), written)
    with pytest.raises(BadDataError, match="a is damaged: it"):
        check_tensors(str(path), written)


def test_an_error_on_the_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    written = write_tensors(str(path), some())
    with pytest.raises(KeyError):
        write_tensors(str(path), {"a": torch.zeros(3), "complex": torch.zeros(3, dtype=torch.complex64)})
    broken = torch.zeros(3)
    broken.detach = None
    with pytest.raises(TypeError):
        write_tensors(str(path), {"a": torch.zeros(3), "b": broken})
    check_tensors(str(path), written)
    assert os.listdir(tmp_path) == ["a"]


def test_a_table_is_not_held_twice(tmp_path):
    """400 MB are written and read back within 100 MB beyond the tensors themselves."""
    code = """
import resource, sys, torch
from onetrans.tensors import read_tensors, write_tensors
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
table = torch.ones(100_000_000 // 4, 4)
before = peak()
write_tensors(sys.argv[1], {"table": table})
wrote = peak() - before
del table
assert torch.equal(read_tensors(sys.argv[1])["table"][-1], torch.ones(4))
print(wrote, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    wrote, read = map(int, done.stdout.split())
    assert wrote < 100
    assert read < 100
