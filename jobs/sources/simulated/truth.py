"""What shoppers want: the exact probability of a click, and of a purchase after a click.

A shopper runs one errand per surface.  **What they did last on the surface they
are on tells what they are after**: a click or a cart there means more of that
category, and a cart more strongly than a click; a purchase there means the
errand is done, so its own category is no longer wanted and the category that
complements it is.  What they did on other surfaces since says little.  Beside
the errand there are **open carts**: a category that was carted and not bought
since is still wanted, most of all when it comes to paying.  The rest is what
any ranking model finds: the item's appeal, the taste of the shopper's segment
and of the shopper, price, surface, device, and the position in the list.

So the answer lies in relations between events of different types: which of all
events was the last on this surface, and whether a purchase came after a cart.
A model that pools each type's events on its own sees how much of each there
was, and only roughly which came last.

Shape suffixes: R requests of one step, K places of a request's list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NOTHING, CLICKED, CARTED, BOUGHT = 0, 1, 2, 3
"""What a shopper did last on a surface."""

PLACE_EFFECT = -0.03
"""Added to the click logit per place further down the list."""


@dataclass(frozen=True)
class Errand:
    """How the last event on the request's surface moves the logits of click and of purchase.

    Each pair is indexed by what was done last: nothing, clicked, carted, bought.
    """

    same_click: tuple[float, ...] = (0.0, 1.5, 2.1, -1.2)
    """Click logit of candidates in the category of that event."""
    same_purchase: tuple[float, ...] = (0.0, 1.0, 2.0, -1.5)
    """Purchase logit of the same."""
    complement_click: tuple[float, ...] = (0.0, 0.0, 0.0, 2.0)
    """Click logit of candidates in the category that complements it."""
    complement_purchase: tuple[float, ...] = (0.0, 0.0, 0.0, 2.0)
    """Purchase logit of the same."""


@dataclass(frozen=True)
class OpenCart:
    """How a category that was carted, and not bought since, moves the logits."""

    click: float = 0.4
    """Click logit of candidates in that category."""
    purchase: float = 1.2
    """Purchase logit of the same."""


@dataclass(frozen=True)
class Truth:
    """All coefficients that depend on what the shopper did; the rest belongs to items and shoppers."""

    errand: Errand = Errand()
    """The errand of the request's surface."""
    open_cart: OpenCart = OpenCart()
    """Carts that were not followed by a purchase."""
    click_base: float = -1.75
    """Click logit of an average candidate nobody looks for."""
    purchase_base: float = -1.55
    """Purchase logit of the same, once clicked."""

    def click_logit_RK(
        self, appeal_RK: Floats, did_last_R: Integers, same_RK: Floats, complement_RK: Floats, open_cart_RK: Floats
    ) -> Floats:
        """Return the click logits of every candidate.

        Args:
            appeal_RK: what items, tastes and the context add.
            did_last_R: what the shopper did last on this surface (``NOTHING`` ... ``BOUGHT``).
            same_RK: 1 where the candidate is in the category of that event.
            complement_RK: 1 where the candidate is in the category that complements it.
            open_cart_RK: 1 where the candidate's category was carted and not bought since.
        """
        places_K = np.arange(appeal_RK.shape[1])
        return (
            self.click_base
            + appeal_RK
            + PLACE_EFFECT * places_K
            + np.asarray(self.errand.same_click)[did_last_R][:, None] * same_RK
            + np.asarray(self.errand.complement_click)[did_last_R][:, None] * complement_RK
            + self.open_cart.click * open_cart_RK
        )

    def purchase_logit_RK(
        self, appeal_RK: Floats, did_last_R: Integers, same_RK: Floats, complement_RK: Floats, open_cart_RK: Floats
    ) -> Floats:
        """Return the logits of a purchase after a click; arguments as in :meth:`click_logit_RK`."""
        return (
            self.purchase_base
            + appeal_RK
            + np.asarray(self.errand.same_purchase)[did_last_R][:, None] * same_RK
            + np.asarray(self.errand.complement_purchase)[did_last_R][:, None] * complement_RK
            + self.open_cart.purchase * open_cart_RK
        )


def sigmoid(logit: Floats) -> Floats:
    """Return the probability of a logit."""
    return 1.0 / (1.0 + np.exp(-logit))
