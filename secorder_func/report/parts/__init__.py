"""The parts of a report."""

from __future__ import annotations

from secorder_func.report.finding import Part
from secorder_func.report.parts.layers import LAYERS
from secorder_func.report.parts.samples import SAMPLES
from secorder_func.report.parts.scalars import LOSS, TRACE
from secorder_func.report.parts.spectrum import DENSITY, EIGENVALUES
from secorder_func.report.parts.surface import SURFACE

__all__ = ["PARTS"]

PARTS: tuple[Part, ...] = (LOSS, TRACE, EIGENVALUES, DENSITY, LAYERS, SAMPLES, SURFACE)
