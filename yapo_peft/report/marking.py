"""Text as HTML, with the tokens highlighted at which a feature is on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def marked_tokens(tokens: Sequence[str], values: Sequence[float]) -> str:
    """HTML of the tokens, in a darker colour the larger the feature's activation; escaped, without a wrapper."""
    peak = max(values, default=0.0)
    return "".join(
        f'<mark style="background: rgba(var(--mark, 213, 94, 0), {0.7 * value / peak:.2f}); color: inherit" '
        f'title="{value:.3g}">{escape(token)}</mark>'
        if value > 0
        else escape(token)
        for token, value in zip(tokens, values, strict=True)
    )
