"""The product of an iteration on flat vectors: counted, checked, and in a dtype in which the iteration can work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from secorder_func.checks import check_callable
from secorder_func.errors import ArgumentError, ArgumentTypeError, NonFiniteError, message

__all__ = ["FlatProduct", "least_tolerance"]


def least_tolerance(tol: float, dtype: torch.dtype) -> float:
    """Return `tol`, or what rounding in products of this dtype allows if that is more."""
    half = dtype in (torch.float16, torch.bfloat16)
    # A product in half precision is off by the rounding of its entries; otherwise its sums round too.
    return max(tol, (4 if half else 50) * torch.finfo(dtype).eps)


_TINY = 1e-12  # below it float32 norms lose digits to underflow of the squares


class FlatProduct:
    """The product with vectors `(n,)` or stacked vectors `(b, n)`.

    Parameters
    ----------
    product
        Linear and symmetric. It is given copies, which it may overwrite; its graph is dropped.
    start
        What the iteration starts from.
    where
        The public function, for messages.

    Attributes
    ----------
    dtype
        That of the vectors the product is given: the start's, or the one to which a product promotes them.
    work
        That of the iteration: the same, but float32 for half precision, and float64 for products so small that the
        squares of their entries would vanish.
    num_matvecs
        How many vectors were multiplied.
    """

    def __init__(self, product: Callable[[Tensor], Any], start: Any, where: str) -> None:
        check_callable(product, where, name="the product")
        self.where = where
        if not isinstance(start, Tensor) or not start.is_floating_point():
            given = start.dtype if isinstance(start, Tensor) else type(start).__name__
            self._refuse(f"the start must be a tensor of a real floating dtype, got {given}")
        self.product = product
        self.dtype = start.dtype
        self.work = torch.promote_types(start.dtype, torch.float32)
        self.num_matvecs = 0

    def begin(self, orthonormal: Callable[[torch.dtype], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the first vectors, as `orthonormal(dtype)` makes them, and their product.

        A product of a wider dtype than its vectors is made once more, with vectors of that dtype.
        """
        vectors = orthonormal(self.work)
        result = self._raw(vectors)
        if torch.promote_types(result.dtype, self.work) != self.work:
            self.dtype = self.work = result.dtype
            vectors = orthonormal(self.work)
            result = self._raw(vectors)
        elif self.work == torch.float32 and 0 < float(result.abs().max()) < _TINY:
            self.work = torch.float64
        return vectors.to(self.work), result.to(self.work)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the product in the working dtype."""
        return self._raw(vectors).to(self.work)

    def tolerance(self, tol: float) -> float:
        """Return `tol`, or the relative residual that rounding in the products allows if that is more."""
        return least_tolerance(tol, self.dtype)

    def refuse_values(self) -> NoReturn:
        """Raise the error of a product that is not finite."""
        raise NonFiniteError(
            message(
                self.where,
                f"product {self.num_matvecs} has NaN or infinite entries, or a norm beyond its dtype's range",
                "Check the loss and its gradient at these parameters, or scale the matrix",
            )
        )

    def _raw(self, vectors: Tensor) -> Tensor:
        result = self.product(vectors.to(self.dtype, copy=True))
        self.num_matvecs += 1 if vectors.ndim == 1 else vectors.shape[0]
        if not isinstance(result, Tensor):
            raise ArgumentTypeError(
                message(self.where, f"the product must be a tensor, got {type(result).__name__}")
            )
        if result.shape != vectors.shape:
            self._refuse(
                f"the product must have the shape of its vectors. Expected {tuple(vectors.shape)}, "
                f"got {tuple(result.shape)}"
            )
        if not result.is_floating_point():
            self._refuse(f"the product must be of a real floating dtype, got {result.dtype}")
        if result.device != vectors.device:  # torch mixes them only to fail later, in its own words
            self._refuse(
                f"the product must be on the device of its vectors. Expected {vectors.device}, got {result.device}"
            )
        return result.detach()

    def _refuse(self, problem: str) -> NoReturn:
        raise ArgumentError(message(self.where, problem))
