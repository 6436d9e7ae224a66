"""The Hessian of a model's loss on flat vectors, and eigenvectors as lists like its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from secorder_func.algorithms.eigenpairs import Eigenpairs
from secorder_func.compat._arguments import Leaves
from secorder_func.operators import LinearOperator
from secorder_func.operators.chunks import default_chunk_size

__all__ = ["FlatHessian"]


class FlatHessian:
    """The product with flat vectors `(n,)` or stacked `(b, n)` on some device; it notes where the Hessian is zero."""

    def __init__(self, op: LinearOperator, device: torch.device) -> None:
        self.op, self.flat, self.device = op, op.flat(), device
        self.sizes = [leaf.numel() for leaf in op.like]
        self.zero: list[bool] | None = None

    def draw(self, *count: int) -> Tensor:
        """Return a random vector, or some stacked ones, from the global generator."""
        return torch.randn(*count, self.op.shape[0], dtype=self.op.dtype, device=self.device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the product with one vector or with stacked ones."""
        product: Tensor
        moved = vectors.to(self.op.device)
        if moved.ndim == 1:
            product = self.flat @ moved
        elif len(moved) == 1:
            product = (self.flat @ moved[0])[None]
        else:
            product = self.flat.mm(moved, chunk_size=default_chunk_size(moved.shape[1]))
        if (
            self.zero is None
        ):  # rows of the Hessian that are zero are so in its product with a random vector
            pieces = product.split(self.sizes, dim=-1)
            self.zero = (torch.stack([piece.count_nonzero() for piece in pieces]) == 0).tolist()
        return product.to(self.device)

    def like_parameters(
        self, index: int, found: Eigenpairs, params: Leaves, place: torch.device | None
    ) -> list[Tensor]:
        """Return an eigenvector as a list like all parameters, zeros where the Hessian has zero rows."""
        assert self.zero is not None
        nonzero = bool(found.eigenvalues[index].abs() > found.residual_norms[index])
        pieces = zip(found.eigenvectors[:, index].split(self.sizes), self.zero, strict=True)
        result = []
        for param in params:
            leaf = torch.zeros_like(param, device=place or param.device)
            if param.requires_grad:
                piece, zero = next(pieces)
                if not (zero and nonzero):
                    leaf.copy_(piece.reshape(param.shape))
            result.append(leaf)
        return result
