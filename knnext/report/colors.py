"""The colours that pages and pictures share: blue where the neighbors help, orange where they harm.

The further from the page's ground, the better. style.css holds the same for the light page, and
its own for the dark one.
"""

from __future__ import annotations

INK, MUTED, GRID, CARD = "#1b2126", "#5a6570", "#dfe3e6", "#ffffff"
#: Perplexity from the best point of a surface (first) to the base model (last).
SHADES = (
    *("#08407c", "#14569a", "#2a6db3", "#4685c4", "#659dd2"),
    *("#85b4de", "#a5c9e8", "#c3dbf0", "#dceaf6", "#eff5fb"),
)
#: What is worse than the base model.
OVER = "#f7e3cd"
