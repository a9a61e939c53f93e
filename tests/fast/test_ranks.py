"""What a process knows and refuses before it exchanges anything; two real ones are in tests/component."""

import importlib.util
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from onetrans.distributed import Ranks, is_rank
from onetrans.errors import BadConfigError
from onetrans.loader import Share
from onetrans.models import build_model, preset
from onetrans.models.batch_norm import BatchNorm
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.sharding import ShardedTables, tables_to_shard
from tests.worlds import small_schema


def test_one_process_alone_exchanges_nothing():
    alone = Ranks()
    assert alone.leads
    assert alone.share == Share(0, 1)
    assert alone.total(1.5, 2) == [1.5, 2]
    assert alone.largest(3.0) == 3.0
    assert alone.decide(lambda: "plan") == "plan"
    assert alone.gather([pa.table({"a": [1]}), pa.table({"a": [2]})])["a"].to_pylist() == [1, 2]
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    alone.add_up_gradients([weight])
    assert weight.grad.tolist() == [1.0, 2.0]
    assert alone.tell("word") == ["word"]
    alone.check_same({"weight": weight})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, False), ({"RANK": "0", "WORLD_SIZE": "1"}, False), ({"RANK": "1", "WORLD_SIZE": "2"}, True)],
)
def test_a_rank_is_known_by_the_variables_of_torchrun(environ, expected):
    assert is_rank(environ) is expected


def test_processes_are_not_put_on_one_gpu_nor_on_more_than_there_are():
    second = Ranks(1, 2, 1, 2)
    assert second.device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(BadConfigError, match="'cuda:0' names one GPU for 2 processes"):
        second.device(torch.device("cuda:0"))
    many = torch.cuda.device_count() + 1
    with pytest.raises(BadConfigError, match=f"{many + 1} processes on a machine where {many - 1} GPUs are visible"):
        Ranks(0, many + 1, 0, many + 1).device(torch.device("cuda"))


def test_batch_norm_is_pytorchs_but_for_a_single_row():
    x_NF = torch.randn(5, 3)
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm1d(3)
    torch.testing.assert_close(ours(x_NF), theirs(x_NF))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(x_NF[:1]), theirs.eval()(x_NF[:1]))


def test_tables_are_divided_from_so_many_rows_and_between_several_processes_only():
    schema = small_schema(hash_size=500)
    assert tables_to_shard(schema, 501, Ranks(0, 2)) == ["user", "item"]
    assert tables_to_shard(schema, 502, Ranks(0, 2)) == []
    assert tables_to_shard(schema, 0, Ranks(0, 2)) == []
    assert tables_to_shard(schema, 1, Ranks()) == []


def test_rows_of_divided_tables_are_not_counted():
    schema = small_schema(hash_size=500)
    model = build_model(replace(preset("dcnv2_din", "tiny"), admit_after=2), schema)
    optimizers = build_optimizers(model, optimizer_preset("tiny"))
    with pytest.raises(BadConfigError, match=r"shard_rows does not go with training\.admit_after or"):
        ShardedTables(model, optimizers, ["user"], Ranks(0, 2), torch.device("cpu"))


def test_tables_that_torchrec_cannot_divide_are_refused():
    schema = small_schema(hash_size=500)
    widths = [(6, "a multiple of 4, the model's is 6")]
    if importlib.util.find_spec("torchrec") is None:
        widths.append((8, "not installed: run `make torchrec` in a checkout .* PACKAGES=training-torchrec.txt`"))
    for width, reason in widths:
        model = build_model(replace(preset("dcnv2_din", "tiny"), embedding_dim=width), schema)
        optimizers = build_optimizers(model, optimizer_preset("tiny"))
        with pytest.raises(BadConfigError, match=reason):
            ShardedTables(model, optimizers, ["user"], Ranks(0, 2), torch.device("cpu"))
