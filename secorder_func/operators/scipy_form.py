"""Operators as SciPy sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secorder_func.errors import MissingExtraError

if TYPE_CHECKING:
    import scipy.sparse.linalg

    from secorder_func.operators.linear_operator import LinearOperator

__all__ = ["scipy_form"]


def scipy_form(op: LinearOperator) -> scipy.sparse.linalg.LinearOperator:
    """Return the matrix of an operator for SciPy; see `LinearOperator.scipy`."""
    try:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator as ScipyOperator
    except ImportError as error:
        raise MissingExtraError("LinearOperator.scipy", "SciPy", "scipy") from error
    op.require_real("LinearOperator.scipy")
    flat = op.flat()
    dtype = np.dtype("float64" if op.dtype == torch.float64 else "float32")

    def to_torch(array: Any) -> Tensor:
        return torch.as_tensor(np.array(array, dtype=dtype)).to(dtype=op.dtype, device=op.device)

    def to_numpy(tensor: Tensor) -> Any:
        wide = torch.float64 if op.dtype == torch.float64 else torch.float32
        return tensor.detach().to(device="cpu", dtype=wide).numpy()

    def matvec(array: Any) -> Any:
        return to_numpy(flat @ to_torch(array.reshape(-1)))

    def matmat(array: Any) -> Any:
        return to_numpy(flat.mm(to_torch(array.T).contiguous())).T

    return ScipyOperator(
        op.shape,
        matvec=matvec,
        matmat=matmat,
        rmatvec=matvec if op.symmetric else None,
        rmatmat=matmat if op.symmetric else None,
        dtype=dtype,
    )
