"""What older versions of torch lack, as marks; docs/gotchas.md says the same in words."""

from __future__ import annotations

import pytest
import torch

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
BEFORE_2_10 = VERSION < (2, 10)

needs_traceable_trees = pytest.mark.skipif(
    BEFORE_2_10, reason="Dynamo cannot trace optree before torch 2.10"
)
