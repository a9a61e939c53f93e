"""Row-wise operations whose gradients are written out, for CPUs: norm, rotation, feed-forward, lookup, reordering.

On a CPU a model of moderate width spends most of a step moving rows between memory and the core.
Autograd's own gradients of these operations pass over the rows several times as often as they
must, and keep a copy of most of what lies between.  Each
function here computes what its plain form computes, to within rounding; the plain forms are in the
tests.  On other devices, and where half precision is chosen, the plain form itself runs.

Shape suffixes: those of :mod:`onetrans.batch` and :mod:`onetrans.models.ragged`, and

    X  any rows           W  width of a row
    G  sets of weights    N  rows of one set     M  width in and out     I  inner width
    O  width out          K  slots               Y  rows of a table
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_CACHED_NUMBERS = 1 << 17
"""Numbers of a hidden layer that are computed at a time: with what else is needed they stay in a core's cache."""


def written_out(x: Tensor, *weights: Tensor) -> bool:
    """Tell whether the functions with a gradient of their own apply: on a CPU, in one and the same full precision.

    A compiler finds fewer passes by itself, and is given the plain form.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(weight.dtype == x.dtype for weight in weights)
    )


def rms_norm(x_XW: Tensor, gain_W: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * gain``; the mean is over the last dimension."""
    if written_out(x_XW, gain_W):
        return _RMSNorm.apply(x_XW, gain_W, eps)
    # In the gain's precision: what autocast made half of would be multiplied by it in full precision anyway.
    return F.rms_norm(x_XW.to(gain_W.dtype), gain_W.shape, gain_W, eps)


def _unit(x_XW: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rows of unit mean square, and what they were multiplied by."""
    scale_X1 = x_XW.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x_XW * scale_X1, scale_X1


def _norm_gradients(slope_XW: Tensor, unit_XW: Tensor, scale_X1: Tensor, gain_W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gain, given that of the output."""
    product_XW = slope_XW * unit_XW
    along_X1 = torch.matmul(product_XW, gain_W).div_(gain_W.shape[0]).unsqueeze(-1)
    slope_x_XW = (slope_XW * gain_W).addcmul_(unit_XW, along_X1, value=-1).mul_(scale_X1)
    return slope_x_XW, product_XW.flatten(0, -2).sum(0)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x_XW: Tensor, gain_W: Tensor, eps: float) -> Tensor:
        unit_XW, scale_X1 = _unit(x_XW, eps)
        ctx.save_for_backward(x_XW, scale_X1, gain_W)
        return unit_XW.mul_(gain_W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_XW: Tensor) -> tuple[Tensor, Tensor, None]:
        x_XW, scale_X1, gain_W = ctx.saved_tensors
        return *_norm_gradients(slope_XW, x_XW * scale_X1, scale_X1, gain_W), None


def turn(x_XW: Tensor, cos_XW: Tensor, sin_XW: Tensor, partner_W: Tensor) -> Tensor:
    """Return ``x * cos + x[partner] * sin``: pairs of channels turned by their angles.

    Channel w turns with channel ``partner[w]``, whose partner is w; ``sin`` has opposite signs in the two, so the
    turn by the opposite angle, which is the gradient, is the same formula with ``-sin``.  ``cos`` and ``sin`` may
    lack the leading dimensions of ``x``, and have no gradient.
    """
    return _Turn.apply(x_XW, cos_XW, sin_XW, partner_W)


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x_XW: Tensor, cos_XW: Tensor, sin_XW: Tensor, partner_W: Tensor) -> Tensor:
        ctx.save_for_backward(cos_XW, sin_XW, partner_W)
        return (x_XW * cos_XW).addcmul_(_partners(x_XW, partner_W), sin_XW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_XW: Tensor) -> tuple[Tensor, None, None, None]:
        cos_XW, sin_XW, partner_W = ctx.saved_tensors
        back_XW = (slope_XW * cos_XW).addcmul_(_partners(slope_XW, partner_W), sin_XW, value=-1)
        return back_XW, None, None, None


def _partners(x_XW: Tensor, partner_W: Tensor) -> Tensor:
    return x_XW.reshape(-1, x_XW.shape[-1]).index_select(1, partner_W).view(x_XW.shape)


def keep_gradient_memory(weight: Tensor) -> None:
    """Forget a weight's gradient; its memory is written anew by the next, if a function here computes that.

    Otherwise every step takes the memory of all gradients from the operating system again, which clears it first:
    a tenth of a step with 80 million weights.  Nobody may still want the old gradient.
    """
    if getattr(weight, _REUSES, False):
        setattr(weight, _SPARE, weight.grad)
    weight.grad = None


_REUSES, _SPARE = "_onetrans_reuses_gradient_memory", "_onetrans_spare_gradient"


def _gradient_memory(weight: Tensor) -> Tensor:
    spare: Tensor | None = getattr(weight, _SPARE, None)
    setattr(weight, _SPARE, None)
    return torch.empty_like(weight) if spare is None else spare


def _mark(weight: Tensor, *, reuses: bool) -> None:
    setattr(weight, _REUSES, reuses)
    if not reuses:
        setattr(weight, _SPARE, None)


def own_products(x_GNI: Tensor, weight_GIO: Tensor) -> Tensor:
    """Return the product of each set of rows with its own weight."""
    written = written_out(x_GNI, weight_GIO)
    _mark(weight_GIO, reuses=written)
    return _OwnProducts.apply(x_GNI, weight_GIO) if written else torch.bmm(x_GNI, weight_GIO)


class _OwnProducts(Function):
    @staticmethod
    def forward(ctx: Any, x_GNI: Tensor, weight_GIO: Tensor) -> Tensor:
        ctx.save_for_backward(x_GNI, weight_GIO)
        return torch.bmm(x_GNI, weight_GIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_GNO: Tensor) -> tuple[Tensor, Tensor]:
        x_GNI, weight_GIO = ctx.saved_tensors
        slope_weight_GIO = torch.bmm(x_GNI.transpose(1, 2), slope_GNO, out=_gradient_memory(weight_GIO))
        return torch.bmm(slope_GNO, weight_GIO.transpose(1, 2)), slope_weight_GIO


def wide_linear(parts: Sequence[Tensor], weight_OI: Tensor, bias_O: Tensor) -> list[Tensor]:
    """Return each part times its columns of the weight, which stand in the order of the parts; the last plus the bias.

    The gradient of the weight is one product per part, written into its columns.
    """
    written = written_out(weight_OI, *parts)
    _mark(weight_OI, reuses=written)
    if written:
        return list(_WideLinear.apply(weight_OI, bias_O, *parts))
    weights = weight_OI.split([part.shape[1] for part in parts], dim=1)
    *first, last = zip(parts, weights, strict=True)
    return [*(F.linear(part, weight) for part, weight in first), F.linear(*last, bias_O)]


class _WideLinear(Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bias_O: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight_OI, *parts)
        *first, last = zip(parts, weight_OI.split([part.shape[1] for part in parts], dim=1), strict=True)
        return *(torch.mm(part, weight.t()) for part, weight in first), torch.addmm(bias_O, last[0], last[1].t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        weight_OI, *parts = ctx.saved_tensors
        widths = [part.shape[1] for part in parts]
        slope_weight_OI = _gradient_memory(weight_OI)
        for slope_XO, part_XI, columns_OI in zip(slopes, parts, slope_weight_OI.split(widths, dim=1), strict=True):
            torch.mm(slope_XO.t(), part_XI, out=columns_OI)
        slope_parts = [
            torch.mm(slope, weight) for slope, weight in zip(slopes, weight_OI.split(widths, dim=1), strict=True)
        ]
        return slope_weight_OI, slopes[-1].sum(0), *slope_parts


def feed_forward(z_GNM: Tensor, gain_M: Tensor, eps: float, in_GMI: Tensor, out_GIM: Tensor) -> Tensor:
    """Return ``z + gelu(rms_norm(z) @ in) @ out``, each set of rows with its own weights, in pieces that stay in cache.

    What lies between is computed again for the gradient, which takes less time than writing it to memory.
    """
    return _FeedForward.apply(z_GNM, gain_M, eps, in_GMI, out_GIM)


def _pieces(z_GNM: Tensor, inner: int) -> list[tuple[int, slice]]:
    rows = max(1, _CACHED_NUMBERS // inner)
    sets, count, _ = z_GNM.shape
    return [(g, slice(start, start + rows)) for g in range(sets) for start in range(0, count, rows)]


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, z_GNM: Tensor, gain_M: Tensor, eps: float, in_GMI: Tensor, out_GIM: Tensor) -> Tensor:
        y_GNM = torch.empty_like(z_GNM, memory_format=torch.contiguous_format)
        for g, rows in _pieces(z_GNM, in_GMI.shape[2]):
            z_NM = z_GNM[g, rows]
            hidden_NI = torch.mm(_unit(z_NM, eps)[0].mul_(gain_M), in_GMI[g])
            torch.addmm(z_NM, F.gelu(hidden_NI), out_GIM[g], out=y_GNM[g, rows])
        ctx.save_for_backward(z_GNM, gain_M, in_GMI, out_GIM)
        ctx.eps = eps
        return y_GNM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_GNM: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        z_GNM, gain_M, in_GMI, out_GIM = ctx.saved_tensors
        slope_z_GNM = torch.empty_like(z_GNM, memory_format=torch.contiguous_format)
        slope_gain_M = torch.zeros_like(gain_M)
        slope_in_GMI, slope_out_GIM = torch.empty_like(in_GMI), torch.empty_like(out_GIM)
        if not z_GNM.shape[1]:
            slope_in_GMI.zero_()
            slope_out_GIM.zero_()
        for g, rows in _pieces(z_GNM, in_GMI.shape[2]):
            so_far = 0.0 if rows.start == 0 else 1.0
            slope_NM = slope_GNM[g, rows]
            unit_NM, scale_N1 = _unit(z_GNM[g, rows], ctx.eps)
            normed_NM = unit_NM * gain_M
            hidden_NI = torch.mm(normed_NM, in_GMI[g])
            slope_out_GIM[g].addmm_(F.gelu(hidden_NI).t(), slope_NM, beta=so_far)
            inner_NI = torch.ops.aten.gelu_backward(torch.mm(slope_NM, out_GIM[g].t()), hidden_NI)
            slope_in_GMI[g].addmm_(normed_NM.t(), inner_NI, beta=so_far)
            slope_normed_NM = torch.mm(inner_NI, in_GMI[g].t())
            through_NM, slope_gain = _norm_gradients(slope_normed_NM, unit_NM, scale_N1, gain_M)
            torch.add(through_NM, slope_NM, out=slope_z_GNM[g, rows])
            slope_gain_M += slope_gain
        return slope_z_GNM, slope_gain_M, None, slope_in_GMI, slope_out_GIM


def reorder(x_XW: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
    """Return the rows in another order, given the order and its inverse: the gradient is gathered, not added up."""
    return _Reorder.apply(x_XW, order_X, inverse_X)


class _Reorder(Function):
    @staticmethod
    def forward(ctx: Any, x_XW: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_X)
        return x_XW.index_select(0, order_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_XW: Tensor) -> tuple[Tensor, None, None]:
        return slope_XW.index_select(0, *ctx.saved_tensors), None, None


def to_slots(x_XW: Tensor, row_K: Tensor, slot_X: Tensor) -> Tensor:
    """Return row ``row[k]`` in each slot k; ``slot[x]`` is the one slot where row x counts.

    Slots that are nobody's repeat some row: whoever reads them must give them no weight, then they have no gradient.
    """
    return _ToSlots.apply(x_XW, row_K, slot_X)


class _ToSlots(Function):
    @staticmethod
    def forward(ctx: Any, x_XW: Tensor, row_K: Tensor, slot_X: Tensor) -> Tensor:
        ctx.save_for_backward(slot_X)
        return x_XW.index_select(0, row_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_KW: Tensor) -> tuple[Tensor, None, None]:
        return slope_KW.index_select(0, *ctx.saved_tensors), None, None


def from_slots(x_KW: Tensor, slot_X: Tensor) -> Tensor:
    """Return the rows of some slots, each slot at most once: the gradient is copied, not added up."""
    return _FromSlots.apply(x_KW, slot_X)


class _FromSlots(Function):
    @staticmethod
    def forward(ctx: Any, x_KW: Tensor, slot_X: Tensor) -> Tensor:
        ctx.save_for_backward(slot_X)
        ctx.slots = x_KW.shape[0]
        return x_KW.index_select(0, slot_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_XW: Tensor) -> tuple[Tensor, None]:
        (slot_X,) = ctx.saved_tensors
        slope_KW = slope_XW.new_zeros(ctx.slots, slope_XW.shape[1])
        return slope_KW.index_copy_(0, slot_X, slope_XW), None


def join_to_slots(x_XW: Tensor, y_XW: Tensor, row_K: Tensor, slot_X: Tensor | None) -> Tensor:
    """Return row ``row[k]`` of ``x`` and ``y``, one after the other, in each slot k.

    ``slot[x]`` is the one slot where a row counts, as in :func:`to_slots`; None if rows count in several.
    """
    return _JoinToSlots.apply(x_XW, y_XW, row_K, slot_X)


class _JoinToSlots(Function):
    @staticmethod
    def forward(ctx: Any, x_XW: Tensor, y_XW: Tensor, row_K: Tensor, slot_X: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_K, slot_X)
        ctx.rows = x_XW.shape[0], y_XW.shape[0]
        return torch.cat((x_XW, y_XW)).index_select(0, row_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_KW: Tensor) -> tuple[Tensor, Tensor, None, None]:
        row_K, slot_X = ctx.saved_tensors
        if slot_X is not None:
            slope_XW = slope_KW.index_select(0, slot_X)
        else:
            slope_XW = slope_KW.new_zeros(sum(ctx.rows), slope_KW.shape[1]).index_add_(0, row_K, slope_KW)
        return *slope_XW.split(ctx.rows), None, None


def lookup(rows_X: Tensor, table_YW: Tensor) -> Tensor:
    """Return rows of a table; its gradient is dense, and added up without sorting."""
    return _Lookup.apply(rows_X, table_YW)


class _Lookup(Function):
    @staticmethod
    def forward(ctx: Any, rows_X: Tensor, table_YW: Tensor) -> Tensor:
        ctx.save_for_backward(rows_X)
        ctx.shape = table_YW.shape
        return table_YW.index_select(0, rows_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_XW: Tensor) -> tuple[None, Tensor]:
        (rows_X,) = ctx.saved_tensors
        # Embeddings are columns of one matrix; adding up rows of a copy takes a third of the time.
        return None, slope_XW.new_zeros(ctx.shape).index_add_(0, rows_X, slope_XW.contiguous())
