"""Whole data sets: operators, losses and gradients that are sums over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_params, refuse_sharded
from secorder_func.digest import digest
from secorder_func.errors import ArgumentError, message
from secorder_func.operators.batch_kinds import GaussNewton, Hessian, Other, pair
from secorder_func.operators.batch_operator import operator_over, wide_zeros
from secorder_func.operators.batch_reader import BatchReader
from secorder_func.operators.batch_sums import Add, Args, Batch, BatchSums
from secorder_func.operators.batch_weights import BatchWeights, Value, Weight
from secorder_func.operators.fisher import (
    empirical_fisher_model,
    fisher_model,
    number_of_entries,
    number_of_losses,
)
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.outside import refuse_gradients
from secorder_func.operators.ranks import Ranks, agreed
from secorder_func.operators.value import value_and_gradient
from secorder_func.seeds import draw_seed
from secorder_func.transforms.fisher import Reduction, check_likelihood, check_reduction
from secorder_func.transforms.likelihoods import Likelihood
from secorder_func.transforms.policy import check_mode
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = ["Batches"]


class Batches:
    """A data set in batches, over which losses, gradients and curvature are summed or averaged as one.

    Parameters
    ----------
    data
        A `torch.utils.data.DataLoader`, a list, or anything that gives the same batches whenever it is iterated over.
    reduction
        What the loss of a batch is: `"mean"`, of its samples, tokens or whatever else, or `"sum"`.
    weight
        For means, `weight(*batch)`: what the loss of a batch was averaged over. Without it the number of samples, the
        leading axis of its first tensor. For a token loss with `ignore_index=-100`:
        `lambda inputs, targets: (targets != -100).sum()`.
    prepare
        `prepare(batch) -> tuple` of what a loss takes after the parameters. Without it, a list or tuple is spread, and
        anything else is the only argument.
    check_weights
        Whether to split a few batches of the first pass in two, the first, and of every power of two, and to refuse
        weights and a reduction that the three losses contradict; see Notes.
    group
        A `torch.distributed` process group, or True for that of all processes: each process has a share of the data,
        of any size, and all make the same calls and get the same results. See the page on several processes.

    Notes
    -----
    Every method makes a `LinearOperator`, or a number, of the loss of all the data: each batch counts with its weight,
    so that batches may be of unequal sizes. Its product is one pass over the data, with several vectors one pass for
    all of them (as many as fit memory), and so are trace estimates. Nothing of a batch is kept. Tensors are moved
    to the device of the parameters, if these are on one.

    Random numbers that torch draws, by the loader when it shuffles and augments, or by the loss, are the same at every
    pass; each batch has its own. Global and loaders' generators are left as they were. What draws elsewhere (NumPy)
    must be seeded for every pass; `check` finds out.

    A loss in which samples of a batch influence each other (batch normalisation in training mode, contrastive losses)
    is not the sum or mean of its samples. Then the split of a batch shows that, and what is computed depends on the
    batches; pass `check_weights=False` if that is meant. Losses that draw random numbers, and batches of one sample,
    cannot be checked so.

    Parameters that require gradients make every batch's graph part of the result: detach them, as `functional_loss`
    does, unless that is wanted. One thread at a time passes over data.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import Batches, hutchinson_trace
    >>> f = lambda p, x, y: ((x @ p - y) ** 2).mean()
    >>> x, y, p = torch.eye(3), torch.zeros(3), torch.ones(3)
    >>> op = Batches([(x[:2], y[:2]), (x[2:], y[2:])]).hessian_operator(f, p)
    >>> op.dense()
    tensor([[0.6667, 0.0000, 0.0000],
            [0.0000, 0.6667, 0.0000],
            [0.0000, 0.0000, 0.6667]])
    >>> hutchinson_trace(op, 8).value
    tensor(2.)
    """

    def __init__(
        self,
        data: Any,
        *,
        reduction: Reduction = "mean",
        weight: Weight | None = None,
        prepare: Callable[[Any], tuple[Any, ...]] | None = None,
        check_weights: bool = True,
        group: Any = None,
    ) -> None:
        where = "Batches"
        check_reduction(reduction, where)
        for name, function in (("weight", weight), ("prepare", prepare)):
            if function is not None:
                check_callable(function, where, name=name)
        if reduction == "sum" and weight is not None:
            problem = "a sum has no weights, got reduction='sum' and weight="
            raise ArgumentError(message(where, problem, "Pass one of them"))
        self._reader = BatchReader(data, prepare, where)
        self._weights = BatchWeights(reduction, weight)
        self._check_weights = check_weights
        self._ranks = None if group is None else Ranks(group, where)
        self._checked: WeakSet[Any] = WeakSet()

    def __repr__(self) -> str:
        count = "unknown number of" if self.length is None else self.length
        return f"Batches({count} batches, reduction={self._weights.reduction!r})"

    # ------------------------------------------------------------------------------ reading

    @property
    def length(self) -> int | None:
        """How many batches there are, None if that is not known before."""
        return self._reader.length

    @property
    def ranks(self) -> Ranks | None:
        """The processes that have a share each, if they are several."""
        return self._ranks

    def read(self, device: torch.device | None = None, /) -> Iterator[Args]:
        """Yield the batches, in the same order with the same random numbers whenever they are read."""
        return self._reader.read(device)

    def check(self, f: Callable[..., Any] | None = None, params: Tree = None) -> None:
        """Read the data twice; refuse data that differ, and a loss that does.

        Parameters
        ----------
        f, params
            A loss `f(params, *batch)` to be evaluated twice on every batch with the same random numbers, if given.

        Raises
        ------
        RuntimeError
            With the number of the first batch that differs.
        """
        where = "Batches.check"
        if f is not None:
            check_callable(f, where)
            check_params(params, where)
        sums = self._sums(params, where)
        if self._ranks is None:
            self._check(f, params, sums, where)
            return
        _, failure = self._ranks.attempt(lambda: self._check(f, params, sums, where), None)
        self._ranks.sum(where, [], failure)

    def _check(self, f: LossFn | None, params: Tree, sums: BatchSums, where: str) -> None:
        seen = []
        for index, args in enumerate(self.read(sums.device)):
            seen.append(digest(tree.flatten_fully(args)[0]))
            if f is not None:
                first, second = (self._value(f, params, args, sums, index, where) for _ in range(2))
                if first != second and not (math.isnan(first) and math.isnan(second)):
                    problem = f"the loss of batch {index} is {first!r} and then {second!r}"
                    mend = "Seed what it draws, other than by torch, from its arguments"
                    raise RuntimeError(message(where, problem, mend))
        count = 0
        for index, args in enumerate(self.read(sums.device)):
            count += 1
            if count > len(seen) or digest(tree.flatten_fully(args)[0]) != seen[index]:
                problem = f"batch {index} is another one when the data are read again"
                mend = "Seed what shuffles or augments the data other than by torch, or store them"
                raise RuntimeError(message(where, problem, mend))
        if count < len(seen):
            problem = f"there are {len(seen)} batches, and {count} when the data are read again"
            raise RuntimeError(message(where, problem))

    def _value(
        self, f: LossFn, params: Tree, args: Args, sums: BatchSums, index: int, where: str
    ) -> float:
        with sums.randomness(Batch(index, args, index)).replayed():
            return float(value_and_gradient(f, params, args, where, gradient=False)[0])

    def _sums(
        self,
        params: Tree,
        where: str,
        *,
        weight: Callable[[Args], float] | None = None,
        value: Value | None = None,
        of: Any = None,
    ) -> BatchSums:
        """Return the sums over the batches.

        With `weight` they are divided by it, not multiplied. With `value`, the loss `of` a batch, weights are checked
        in the first pass, once for a loss.
        """
        refuse_sharded(params, where)
        leaves = tuple(tree.flatten(params)[0])
        weights = self._weights
        sums = BatchSums(
            self._reader,
            leaves,
            weights.counted(weight),
            multiplies=weight is None,
            ranks=self._ranks,
            where=where,
        )
        if self._check_weights and value is not None and not self._was_checked(of):
            sums.check = partial(weights.require_right, value, sums)
            sums.passed = partial(self._note_checked, of)
        return sums

    def _was_checked(self, of: Any) -> bool:
        try:
            return of in self._checked
        except TypeError:  # it has no weak reference
            return False

    def _note_checked(self, of: Any) -> None:
        with suppress(TypeError):
            self._checked.add(of)

    # ---------------------------------------------------------------------------- operators

    def hessian_operator(
        self, f: LossFn, params: Tree, *, mode: Mode = "auto", check_finite: bool = False
    ) -> LinearOperator:
        """Return the Hessian of the loss of all data, `f(params, *batch)` of a batch; else as `hessian_operator`."""
        where = "Batches.hessian_operator"
        _check_arguments(where, params, mode, f=f)
        kind = Hessian(f, params, mode, check_finite)
        sums = self._sums(params, where, value=kind.value, of=f)
        return operator_over(kind, sums, params)

    def ggn_operator(
        self,
        model_fn: ModelFn,
        loss_fn: LossFn,
        params: Tree,
        *,
        mode: Mode = "auto",
        check_finite: bool = False,
    ) -> LinearOperator:
        """Return the Gauss-Newton matrix of the loss of all data; else as `ggn_operator`.

        Batches are `(inputs, targets)`.
        """
        where = "Batches.ggn_operator"
        _check_arguments(where, params, mode, model_fn=model_fn, loss_fn=loss_fn)

        def model_of(batch: Batch) -> tuple[ModelFn, LossFn, Any, Any]:
            return model_fn, loss_fn, *pair(batch, where)

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=True)
        sums = self._sums(params, where, value=kind.value, of=loss_fn)
        return operator_over(kind, sums, params)

    def fisher_operator(
        self,
        model_fn: ModelFn,
        likelihood: Likelihood,
        params: Tree,
        *,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        mode: Mode = "auto",
        check_finite: bool = False,
    ) -> LinearOperator:
        """Return the Fisher matrix of all data; `inputs` are the first part of a batch; else as `fisher_operator`.

        With `reduction="mean"` the sum over all entries of the likelihood's batch shape is divided by how many there
        are, or by the sum of `weight(*batch)`, if that is given. Where some entries do not count, padded tokens say,
        let the model return the outputs of the others.
        """
        where = "Batches.fisher_operator"
        check_likelihood(likelihood, where)
        _check_arguments(where, params, mode, model_fn=model_fn)
        seed = None if num_samples is None else agreed(self._ranks, draw_seed(generator))

        def model_of(batch: Batch) -> tuple[ModelFn, LossFn, Any, Any]:
            own = None if seed is None else torch.Generator().manual_seed(seed + batch.number)
            return fisher_model(
                *(model_fn, likelihood, params, batch.args[0]),
                num_samples=num_samples,
                generator=own,
                reduction="sum",
                where=where,
            )

        def entries(args: Args) -> float:
            return float(number_of_entries(model_fn, likelihood, params, args[0], where))

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=False)
        sums = self._sums(params, where, weight=entries)
        return operator_over(kind, sums, params)

    def empirical_fisher_operator(
        self,
        model_fn: ModelFn,
        loss_fn: LossFn,
        params: Tree,
        *,
        mode: Mode = "auto",
        check_finite: bool = False,
    ) -> LinearOperator:
        """Return the empirical Fisher matrix of all data; else as `empirical_fisher_operator`.

        Batches are `(inputs, targets)`. With `reduction="mean"` the sum over all losses is divided by how many there
        are, or by the sum of `weight(*batch)`, if that is given: of tokens with ignored targets the number of the
        others.
        """
        where = "Batches.empirical_fisher_operator"
        _check_arguments(where, params, mode, model_fn=model_fn, loss_fn=loss_fn)

        def model_of(batch: Batch) -> tuple[ModelFn, LossFn, Any, Any]:
            functions = model_fn, loss_fn, params
            return empirical_fisher_model(
                *functions, *pair(batch, where), reduction="sum", where=where
            )

        def losses(args: Args) -> float:
            return float(number_of_losses(model_of(Batch(0, args, 0)), params))

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=False)
        sums = self._sums(params, where, weight=losses)
        return operator_over(kind, sums, params)

    def operator(self, make: Callable[..., LinearOperator], like: Tree) -> LinearOperator:
        """Return the sum, or weighted mean, of the operators `make(*batch)`, on trees like `like`.

        Examples
        --------
        >>> import torch
        >>> from secorder_func import Batches, LinearOperator
        >>> scale = lambda d: LinearOperator(lambda v: d.mean() * v, torch.zeros(2))
        >>> batches = Batches([torch.tensor([1.0, 3.0]), torch.tensor([5.0])])
        >>> batches.operator(scale, torch.zeros(2)) @ torch.ones(2)
        tensor([3., 3.])
        """
        where = "Batches.operator"
        check_callable(make, where, name="make")
        check_params(like, where, name="like")
        return operator_over(Other(make, like), self._sums(like, where), like)

    # -------------------------------------------------------------------- losses and gradients

    def loss(self, f: LossFn, params: Tree) -> Tensor:
        """Return the loss of all data, 0-dim and detached."""
        return self._loss(f, params, "Batches.loss", gradient=False)[0]

    def loss_and_gradient(self, f: LossFn, params: Tree) -> tuple[Tensor, Tree]:
        """Return the loss of all data and its gradient, a tree like `params`, both detached.

        Examples
        --------
        >>> import torch
        >>> from secorder_func import Batches
        >>> Batches([torch.ones(2), torch.zeros(1)]).loss_and_gradient(lambda p, x: (p * x).mean(), torch.tensor(3.0))
        (tensor(2.), tensor(0.6667))
        """
        value, gradient = self._loss(f, params, "Batches.loss_and_gradient", gradient=True)
        leaves, unflatten = tree.flatten(params)
        return value, unflatten([g.to(leaf) for g, leaf in zip(gradient, leaves, strict=True)])

    def _loss(
        self, f: LossFn, params: Tree, where: str, *, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        check_callable(f, where)
        check_params(params, where)
        refuse_gradients(where)
        params = tree.map(Tensor.detach, params)

        def value_of(batch: Batch) -> Tensor:
            return value_and_gradient(f, params, batch.args, where, gradient=False)[0]

        def add_loss(batch: Batch, add: Add) -> None:
            value, found = value_and_gradient(f, params, batch.args, where, gradient=gradient)
            add([value.double(), *found])

        sums = self._sums(params, where, value=value_of, of=f)
        leaves, _ = tree.flatten(params)
        number = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
        zeros = [wide_zeros(leaf) for leaf in leaves] if gradient else []
        value, *rest = sums.over(where, [number, *zeros], add_loss)
        dtype = torch.promote_types(tree.common_dtype(params), torch.float32)
        return value.to(dtype.to_real()), rest


def _check_arguments(where: str, params: Tree, mode: Mode, **functions: Any) -> None:
    """Refuse what is no function, by its name, and parameters and modes that are none."""
    for name, function in functions.items():
        check_callable(function, where, name=name)
    check_params(params, where)
    check_mode(mode, where)
