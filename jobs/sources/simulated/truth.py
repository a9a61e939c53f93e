"""What shoppers want: the exact probability of a click, and of a purchase after a click.

**What a shopper did last and where they are now tell which offer they want.**
On the feed they look around: after a click they want what is new, after a cart a
bargain, after a purchase an add-on.  In search they mean to buy: after a click they
want a bargain, after a cart an add-on, after a purchase what is new.  Beside that,
the category of that last event attracts clicks, and a category that was carted
and not bought since is more readily paid for.  The rest is what any ranking model
finds: the item's appeal, the taste of the shopper's segment and of the shopper,
price, surface, device, and the place in the list.

So the answer lies in a relation between events of different types (which of all
clicks, carts and purchases came last), and in what the request's surface makes of
it.  Clicks, carts and purchases of one visit lie seconds apart: a model that reads
each type's events on its own sees how long ago each was, but hardly ever which
was the last.

Shape suffixes: R requests of one round, K places of a request's list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NOTHING, CLICKED, CARTED, BOUGHT = 0, 1, 2, 3
"""What a shopper did last."""

SURFACES = ("feed", "search")
"""Where a shopper is."""

OFFERS = ("regular", "new", "bargain", "add_on")
"""How an item is offered."""

REGULAR, NEW, BARGAIN, ADD_ON = range(len(OFFERS))

WANTED = ((REGULAR, NEW, BARGAIN, ADD_ON), (REGULAR, BARGAIN, ADD_ON, NEW))
"""The offer a shopper wants, by surface and by what they did last; after nothing, none in particular."""


@dataclass(frozen=True)
class Truth:
    """Every coefficient that depends on what the shopper did; the rest belongs to items and shoppers."""

    click_base: float = -1.6
    """Click logit of an average regular item at the top of the list."""
    click_wanted: float = 2.2
    """Added to the click logit of an item with the wanted offer."""
    click_unwanted: float = -1.0
    """Added to the click logit of an item with another offer than the wanted one, regular ones apart."""
    click_same_category: float = 0.5
    """Added to the click logit of items in the category of the last event."""
    click_open_cart: float = 0.3
    """Added to the click logit of items in a category with an open cart."""
    click_per_place: float = -0.03
    """Added to the click logit per place down the list."""
    purchase_base: float = -1.1
    """Purchase logit of an average clicked regular item."""
    purchase_wanted: float = 1.8
    """Added to the purchase logit of an item with the wanted offer."""
    purchase_unwanted: float = -1.0
    """Added to the purchase logit, as ``click_unwanted``."""
    purchase_open_cart: float = 1.0
    """Added to the purchase logit of items in a category with an open cart."""

    def click_probability(
        self, appeal_RK: Floats, wanted_R: Integers, offer_RK: Integers, same_RK: Floats, open_cart_RK: Floats
    ) -> Floats:
        """Return the probability of a click on every candidate.

        Args:
            appeal_RK: what item, taste and context add to the logit.
            wanted_R: the offer the shopper wants, an entry of ``WANTED``.
            offer_RK: index into ``OFFERS``.
            same_RK: 1 where the item is in the category of the last event.
            open_cart_RK: 1 where the item's category was carted and not bought since.
        """
        return sigmoid(
            self.click_base
            + appeal_RK
            + self.click_per_place * np.arange(appeal_RK.shape[1])
            + _by_offer(wanted_R, offer_RK, self.click_wanted, self.click_unwanted)
            + self.click_same_category * same_RK
            + self.click_open_cart * open_cart_RK
        )

    def purchase_probability(
        self, appeal_RK: Floats, wanted_R: Integers, offer_RK: Integers, open_cart_RK: Floats
    ) -> Floats:
        """Return the probability of a purchase once clicked; arguments as in :meth:`click_probability`."""
        return sigmoid(
            self.purchase_base
            + appeal_RK
            + _by_offer(wanted_R, offer_RK, self.purchase_wanted, self.purchase_unwanted)
            + self.purchase_open_cart * open_cart_RK
        )


def _by_offer(wanted_R: Integers, offer_RK: Integers, wanted: float, unwanted: float) -> Floats:
    """Return what the offers add to a logit; regular items gain and lose nothing, nor does one who wants nothing."""
    effect_RK = np.where(offer_RK == wanted_R[:, None], wanted, unwanted)
    return np.where((offer_RK == REGULAR) | (wanted_R == REGULAR)[:, None], 0.0, effect_RK)


def sigmoid(logit: Floats) -> Floats:
    """Return the probability of a logit."""
    return 1.0 / (1.0 + np.exp(-logit))
