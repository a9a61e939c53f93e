"""What shoppers want: the exact probability of a click, and of a purchase after a click.

On each surface a shopper is in a mood of its own, and **what they did last on
that surface tells which**: after a click they explore and want what is new;
after a cart they decide and want a bargain; after a purchase they are done and
want an add-on.  What they did on another surface since changes nothing here.
Beside the mood, the category of that last event attracts clicks, and a category
that was carted and not bought since is more readily paid for.  The rest is what
any ranking model finds: the item's appeal, the taste of the shopper's segment and
of the shopper, price, surface, device, and the place in the list.

So the answer lies in a relation between events of different types, chosen by the
request: which of all clicks, carts and purchases on this surface came last, and
whether a purchase followed a cart.  A model that adds up each type's events on
its own sees how much of each there was, and only roughly which came last.

Shape suffixes: R requests of one round, K places of a request's list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NOTHING, CLICKED, CARTED, BOUGHT = 0, 1, 2, 3
"""What a shopper did last on a surface."""

OFFERS = ("regular", "new", "bargain", "add_on")
"""How an item is offered; the columns of a mood's table."""

Effects = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Truth:
    """Every coefficient that depends on what the shopper did; the rest belongs to items and shoppers."""

    click_base: float = -1.6
    """Click logit of an average item at the top of the list, outside any mood."""
    click_mood: Effects = ((0.0, 0.0, 0.0, 0.0), (0.0, 2.2, -1.0, -1.0), (0.0, -1.0, 2.2, -1.0), (0.0, -1.0, -1.0, 2.2))
    """Added to the click logit, by what was done last on the surface (rows) and by the offer (columns)."""
    click_same_category: float = 0.5
    """Added to the click logit of items in the category of that last event."""
    click_open_cart: float = 0.3
    """Added to the click logit of items in a category with an open cart."""
    click_per_place: float = -0.03
    """Added to the click logit per place down the list."""
    purchase_base: float = -1.1
    """Purchase logit of an average clicked item, outside any mood."""
    purchase_mood: Effects = (
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 1.8, -1.0, -1.0),
        (0.0, -1.0, 1.8, -1.0),
        (0.0, -1.0, -1.0, 1.8),
    )
    """Added to the purchase logit, as ``click_mood``."""
    purchase_open_cart: float = 1.0
    """Added to the purchase logit of items in a category with an open cart."""

    def click_probability(
        self, appeal_RK: Floats, did_last_R: Integers, offer_RK: Integers, same_RK: Floats, open_cart_RK: Floats
    ) -> Floats:
        """Return the probability of a click on every candidate.

        Args:
            appeal_RK: what item, taste and context add to the logit.
            did_last_R: what the shopper did last on this surface (``NOTHING`` ... ``BOUGHT``).
            offer_RK: index into ``OFFERS``.
            same_RK: 1 where the item is in the category of that last event.
            open_cart_RK: 1 where the item's category was carted and not bought since.
        """
        return sigmoid(
            self.click_base
            + appeal_RK
            + self.click_per_place * np.arange(appeal_RK.shape[1])
            + np.asarray(self.click_mood)[did_last_R[:, None], offer_RK]
            + self.click_same_category * same_RK
            + self.click_open_cart * open_cart_RK
        )

    def purchase_probability(
        self, appeal_RK: Floats, did_last_R: Integers, offer_RK: Integers, open_cart_RK: Floats
    ) -> Floats:
        """Return the probability of a purchase once clicked; arguments as in :meth:`click_probability`."""
        return sigmoid(
            self.purchase_base
            + appeal_RK
            + np.asarray(self.purchase_mood)[did_last_R[:, None], offer_RK]
            + self.purchase_open_cart * open_cart_RK
        )


def sigmoid(logit: Floats) -> Floats:
    """Return the probability of a logit."""
    return 1.0 / (1.0 + np.exp(-logit))
