"""Row-wise operations with gradients of their own against their plain forms, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from onetrans.models import embeddings as embeddings_module
from onetrans.models import rowwise
from onetrans.models.embeddings import Embeddings
from tests.batches import model_schema

EPS = 1e-6


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(function, plain, *inputs):
    """Both give the same outputs, and the same gradients for a loss that weighs every number differently."""
    weights = None
    found = []
    for each in (function, plain):
        out = each(*inputs)
        weights = torch.randn_like(out) if weights is None else weights
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def plain_norm(x, gain):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain


@pytest.mark.parametrize("shape", [(7, 6), (0, 6), (3, 5, 6), (3, 5, 2, 6)])
def test_rms_norm(shape):
    torch.manual_seed(0)
    assert_same(lambda x, g: rowwise.rms_norm(x, g, EPS), plain_norm, numbers(*shape), numbers(6))


def test_rms_norm_of_rows_that_are_not_in_order():
    torch.manual_seed(0)
    assert_same(
        lambda x, g: rowwise.rms_norm(x.transpose(0, 1), g, EPS),
        lambda x, g: plain_norm(x.transpose(0, 1), g),
        numbers(3, 5, 6), numbers(6),
    )  # fmt: skip


def test_turn():
    torch.manual_seed(0)
    angle_NA = torch.randn(5, 3, dtype=torch.float64)
    cos, sin = angle_NA.cos(), angle_NA.sin()
    partner_W = torch.tensor([3, 4, 5, 0, 1, 2])

    def plain(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    for shape in ((5, 6), (4, 5, 6)):
        assert_same(
            lambda x: rowwise.turn(x, cos.repeat(1, 2), torch.cat((-sin, sin), dim=1), partner_W),
            plain,
            numbers(*shape),
        )


@pytest.mark.parametrize("rows", [0, 1, 5, 9])
@pytest.mark.parametrize("sets", [1, 3])
def test_feed_forward_in_pieces(rows, sets, monkeypatch):
    """Pieces of two rows: the last one is not full, and weights' gradients are sums over pieces."""
    monkeypatch.setattr(rowwise, "_CACHED_NUMBERS", 16)
    torch.manual_seed(0)

    def plain(z, gain, into, out):
        return z + torch.bmm(F.gelu(torch.bmm(plain_norm(z, gain), into)), out)

    assert_same(
        lambda z, gain, into, out: rowwise.feed_forward(z, gain, EPS, into, out), plain,
        numbers(sets, rows, 4), numbers(4), numbers(sets, 4, 8), numbers(sets, 8, 4),
    )  # fmt: skip


def test_own_products():
    torch.manual_seed(0)
    assert_same(rowwise.own_products, torch.bmm, numbers(3, 5, 4), numbers(3, 4, 2))


@pytest.mark.parametrize("rows", [(2, 5), (0, 5), (4,)])
def test_wide_linear(rows):
    """Each part has its own rows and its own columns of the weight; the bias belongs to the last."""
    torch.manual_seed(0)
    widths = (3, 2)[-len(rows) :]

    def plain(weight, bias, *parts):
        columns = weight.split(widths, dim=1)
        out = [part @ of_part.T for part, of_part in zip(parts, columns, strict=True)]
        return torch.cat((*out[:-1], out[-1] + bias))

    assert_same(
        lambda weight, bias, *parts: torch.cat(rowwise.wide_linear(parts, weight, bias)), plain,
        numbers(6, sum(widths)), numbers(6), *(numbers(n, width) for n, width in zip(rows, widths, strict=True)),
    )  # fmt: skip


def test_memory_of_a_forgotten_gradient_is_written_anew():
    torch.manual_seed(0)
    weight, x = numbers(3, 4, 2), numbers(3, 5, 4)
    memory = []
    for scale in (1.0, 2.0):
        rowwise.keep_gradient_memory(weight)
        assert weight.grad is None
        (rowwise.own_products(x, weight) * scale).sum().backward()
        memory.append(weight.grad.data_ptr())
        expected = scale * x.sum(1)[:, :, None].expand(3, 4, 2)
        torch.testing.assert_close(weight.grad, expected.detach())
    assert memory[0] == memory[1]
    kept = weight.grad
    weight.grad = None  # not through the function: the gradient may still be wanted
    rowwise.own_products(x, weight).sum().backward()
    assert weight.grad.data_ptr() != kept.data_ptr()


def test_reordered_rows():
    torch.manual_seed(0)
    order = torch.tensor([3, 0, 2, 1])
    inverse = torch.tensor([1, 3, 2, 0])
    assert_same(lambda x: rowwise.reorder(x, order, inverse), lambda x: x[order], numbers(4, 3))


def test_slots():
    """Row 1 stands in two slots, of which the first counts: the other one has no weight, so no gradient."""
    torch.manual_seed(0)
    row_K, slot_X = torch.tensor([1, 1, 0, 2]), torch.tensor([2, 0, 3])
    weight_K1 = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    assert_same(
        lambda x: rowwise.to_slots(x, row_K, slot_X) * weight_K1,
        lambda x: torch.zeros(4, 3, dtype=torch.float64).index_copy(0, slot_X, x),
        numbers(3, 3),
    )
    assert_same(lambda x: rowwise.from_slots(x, slot_X), lambda x: x[slot_X], numbers(4, 3))


@pytest.mark.parametrize("slots", [[2, 0, 4, 1], None])
def test_rows_of_two_joined_in_slots(slots):
    """With a slot of each row, slot 3 repeats row 0 and does not count; without, both do."""
    torch.manual_seed(0)
    row_K = torch.tensor([1, 3, 0, 0, 2])
    weight_K1 = torch.tensor([1.0, 1.0, 1.0, 0.0 if slots else 2.0, 1.0], dtype=torch.float64)[:, None]
    slot_X = None if slots is None else torch.tensor(slots)
    assert_same(
        lambda x, y: rowwise.join_to_slots(x, y, row_K, slot_X) * weight_K1,
        lambda x, y: torch.cat((x, y))[row_K] * weight_K1,
        numbers(3, 2), numbers(1, 2),
    )  # fmt: skip


def test_lookup_adds_up_rows_that_occur_twice():
    torch.manual_seed(0)
    rows = torch.tensor([4, 0, 4, 4, 2])
    assert_same(lambda table: rowwise.lookup(rows, table), lambda table: F.embedding(rows, table), numbers(5, 3))


@pytest.mark.parametrize("sparse_from", [1, 1 << 40])
def test_sparse_and_dense_gradients_of_a_table_are_equal(sparse_from, monkeypatch):
    monkeypatch.setattr(embeddings_module, "SPARSE_FROM_NUMBERS", sparse_from)
    torch.manual_seed(0)
    tables = Embeddings(model_schema(), width=3)
    rows_MF = torch.tensor([[7, 1, 2], [7, 3, 0], [0, 1, 2]])
    weights_MQ = torch.arange(1.0, 28.0).view(3, 9)
    (tables("item", rows_MF) * weights_MQ).sum().backward()
    gradient = tables.table("item").grad
    assert gradient.is_sparse == (sparse_from == 1)
    expected = torch.zeros(5001, 3)
    expected[7] = weights_MQ[0, :3] + weights_MQ[1, :3]
    expected[0] = weights_MQ[2, :3]
    assert torch.equal(gradient.to_dense()[:5000], expected[:5000])


def test_half_precision_runs_the_plain_form():
    x, gain = torch.randn(2, 4), torch.ones(4)
    assert rowwise.written_out(x, gain)
    assert not rowwise.written_out(x.bfloat16(), gain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not rowwise.written_out(x, gain)
