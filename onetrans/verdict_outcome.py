"""What became of a verdict, told at the head of its page: the one part that is known only after the promotion.

It stands apart from :mod:`onetrans.verdict_page`, so that promoting needs no NumPy.
"""

from __future__ import annotations

import re
from html import escape

_BEGIN, _END = "<!--outcome-->", "<!--/outcome-->"
_QUIET = "#52606d"
_TOLD = {"held": "passed, not promoted", "declined": "not promoted", "promoted": "promoted"}


def headline(label: str, colour: str, title: str, told: str = "") -> str:
    """Return the headline of a page; :func:`with_outcome` replaces it.

    Args:
        label: what was decided, in two or three words.
        colour: of the badge.
        title: what the page is about, escaped.
        told: a sentence that follows, or nothing.
    """
    note = f'<p class="warn">{escape(told)}</p>' if told else ""
    badge = f'<span class="pill" style="background:{colour}">{escape(label.upper())}</span>'
    return f"{_BEGIN}<h1>{badge}{title}</h1>{note}{_END}"


def with_outcome(page: str, decision: str, reason: str) -> str:
    """Return a page whose headline says what was done, and why."""
    told = f"{_TOLD[decision].capitalize()}: {reason.rstrip('.')}."
    pattern = re.compile(f"{_BEGIN}<h1><span[^>]*>[^<]*</span>(?P<title>.*?)</h1>.*?{_END}", re.DOTALL)
    return pattern.sub(lambda found: headline(_TOLD[decision], _QUIET, found["title"], told), page, count=1)
