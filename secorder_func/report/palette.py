"""Colours of all pictures: those of Okabe and Ito, which people with colour-blindness tell apart.

M. Okabe, K. Ito, Color universal design, 2008. https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "VERMILLION"]

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#808080"
