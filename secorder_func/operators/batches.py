"""Whole data sets: operators, losses and gradients that are sums over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_params
from secorder_func.digest import digest
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.batch_kinds import GaussNewton, Hessian, Other, pair
from secorder_func.operators.batch_operator import operator_over, wide_zeros
from secorder_func.operators.batch_sums import Add, Args, Batch, BatchSums
from secorder_func.operators.fisher import (
    empirical_fisher_model,
    fisher_model,
    number_of_entries,
    number_of_losses,
)
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.outside import refuse_gradients
from secorder_func.operators.ranks import Ranks
from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import vjp_aux
from secorder_func.seeds import draw_seed
from secorder_func.transforms.fisher import Reduction, check_likelihood, check_reduction
from secorder_func.transforms.likelihoods import Likelihood
from secorder_func.transforms.loss import checked_scalar, flat_loss
from secorder_func.transforms.policy import check_mode
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = ["Batches"]

Weight: TypeAlias = "Callable[..., float | Tensor]"
_END = object()


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
        if isinstance(data, Tensor):
            problem = "data must give batches, got a tensor"
            raise ArgumentTypeError(
                message(where, problem, "Pass [(inputs, targets)] for one batch")
            )
        if not isinstance(data, Iterable):
            problem = f"data must be iterable, got {type(data).__name__}"
            raise ArgumentTypeError(
                message(where, problem, "Pass a DataLoader or a list of batches")
            )
        if isinstance(data, Iterator):
            problem = f"data must be the same whenever they are read, got {type(data).__name__}, which can be read once"
            raise ArgumentTypeError(
                message(where, problem, "Pass a list, or the DataLoader itself")
            )
        if getattr(data, "persistent_workers", False):
            problem = "persistent workers go on with other random numbers at every pass"
            mend = "Make the DataLoader with persistent_workers=False"
            raise ArgumentError(message(where, problem, mend))
        check_reduction(reduction, where)
        for name, function in (("weight", weight), ("prepare", prepare)):
            if function is not None:
                check_callable(function, where, name=name)
        if reduction == "sum" and weight is not None:
            problem = "a sum has no weights, got reduction='sum' and weight="
            raise ArgumentError(message(where, problem, "Pass one of them"))
        self._data = data
        self._reduction = reduction
        self._user_weight = weight
        self._prepare = prepare
        self._check_weights = check_weights
        self._ranks = None if group is None else Ranks(group, where)
        self._generators = _generators_of(data)
        self._states = [generator.get_state() for generator in self._generators]
        self._random = RandomState.now([])
        self._shapes: Any = None
        self._checked: WeakSet[Any] = WeakSet()

    def __repr__(self) -> str:
        count = "unknown number of" if self.length is None else self.length
        return f"Batches({count} batches, reduction={self._reduction!r})"

    # ------------------------------------------------------------------------------ reading

    @property
    def length(self) -> int | None:
        """How many batches there are, None if that is not known before."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:  # an iterable data set behind a loader
            return None

    @property
    def ranks(self) -> Ranks | None:
        """The processes that have a share each, if they are several."""
        return self._ranks

    def read(self, device: torch.device | None = None, /) -> Iterator[Args]:
        """Yield the batches, in the same order with the same random numbers whenever they are read."""
        stream = _Stream(self._random, self._generators, self._states)
        with stream.drawn():
            iterator = iter(self._data)
        while True:
            with stream.drawn():
                batch = next(iterator, _END)
                if batch is _END:
                    return
                prepared = self._prepared(batch, device)
            yield prepared

    def _prepared(self, batch: Any, device: torch.device | None) -> Args:
        if self._prepare is not None:
            found: Any = self._prepare(batch)
            if not isinstance(found, (tuple, list)):
                problem = f"prepare must return a tuple, got {type(found).__name__}"
                mend = "Write lambda batch: (batch,) for one argument"
                raise ArgumentTypeError(message("Batches", problem, mend))
            batch = found
        if not isinstance(batch, (tuple, list)):
            batch = (batch,)
        if device is None:
            return tuple(batch)
        tensors, restore = tree.tensors_and_rest(tuple(batch))
        moved: Args = restore([tensor.to(device, non_blocking=True) for tensor in tensors])
        return moved

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
        sums = self._sums(params, self._weight, where)
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
        loss = flat_loss(f, params, args, {}, has_aux=False, where=where)
        with sums.randomness(Batch(index, args, index)).replayed(), torch.no_grad():
            return float(checked_scalar(loss.eager(), where))

    # ---------------------------------------------------------------------------- weighting

    def _weight(self, args: Args) -> float:
        """Return what the loss of a batch was averaged over."""
        if self._user_weight is None:
            return self._number_of_samples(args)
        return self._users(args)

    def _instead_of(self, counted: Callable[[Args], float]) -> Callable[[Args], float]:
        """Return the user's weight, or what is counted if there is none."""
        return counted if self._user_weight is None else self._users

    def _users(self, args: Args) -> float:
        assert self._user_weight is not None
        weight: Any = self._user_weight(*args)
        one = isinstance(weight, Tensor) and weight.numel() == 1
        if not one and not isinstance(weight, (int, float)):
            given = tuple(weight.shape) if isinstance(weight, Tensor) else repr(weight)
            problem = f"weight(*batch) must return a number, got {given}"
            raise ArgumentTypeError(message("Batches", problem, "Sum what counts in a batch"))
        number = float(weight)
        if not 0 <= number < math.inf:
            problem = f"weight must return a number from 0 on, got {number}"
            raise ArgumentError(message("Batches", problem))
        return number

    def _number_of_samples(self, args: Args) -> float:
        tensors = tree.tensors_in(args)
        mend = "Pass weight=, what the loss of a batch is averaged over"
        if not tensors:
            kinds = ", ".join(type(arg).__name__ for arg in args) or "nothing"
            problem = f"a batch has no tensor, but {kinds}"
            raise ArgumentTypeError(
                message("Batches", problem, "Pass prepare=, which makes tensors of a batch")
            )
        if not tensors[0].ndim:
            problem = "the first tensor of a batch has no leading axis of samples"
            raise ArgumentError(message("Batches", problem, mend))
        shapes = [tuple(t.shape[1:]) for t in tensors]
        if self._shapes is None:
            self._shapes = shapes
        if shapes != self._shapes:
            problem = (
                f"samples of different batches have different shapes, {shapes} after {self._shapes}: "
                "their number may not be what the loss is averaged over"
            )
            raise ArgumentError(message("Batches", problem, mend))
        return float(tensors[0].shape[0])

    def _sums(
        self,
        params: Tree,
        weight: Callable[[Args], float],
        where: str,
        *,
        value: Callable[[Batch], Tensor | None] | None = None,
        of: Any = None,
        multiplies: bool = True,
    ) -> BatchSums:
        """Return the sums over the batches; weights are checked against the values of the loss `of` once."""
        leaves = tuple(tree.flatten(params)[0])
        weight_of = weight if self._reduction == "mean" else None
        sums = BatchSums(self, leaves, weight_of, multiplies, self._ranks, where=where)
        if self._check_weights and value is not None and not self._was_checked(of):
            sums.check = partial(self._require_right_weights, value, sums)
        return sums

    def _was_checked(self, of: Any) -> bool:
        """Say whether the weights of this loss were checked before; now they are."""
        try:
            known = of in self._checked
            self._checked.add(of)
        except TypeError:  # it has no weak reference
            return False
        return known

    def _agreed(self, seed: int) -> int:
        return seed if self._ranks is None else int(self._ranks.agree(seed))

    def _require_right_weights(
        self, value: Callable[[Batch], Tensor | None], sums: BatchSums, batch: Batch
    ) -> None:
        """Refuse weights and a reduction that the losses of the parts of a batch contradict."""
        tensors, restore = tree.tensors_and_rest(batch.args)
        counts = {t.shape[0] if t.ndim else 0 for t in tensors}
        count = counts.pop() if len(counts) == 1 else 0
        if count < 2:
            return  # it cannot be split
        cut = max(count // 3, min(2, count // 2))  # of one alone some losses are not defined
        halves = [restore([t[rows] for t in tensors]) for rows in (slice(cut), slice(cut, None))]
        state = sums.randomness(batch)
        terms = []
        for args in (batch.args, *halves):
            weight = self._weight(args) if self._reduction == "mean" else 1.0
            with state.replayed(), torch.no_grad():
                try:
                    found = value(replace(batch, args=args)) if weight else torch.zeros(())
                except Exception:
                    if args is batch.args:
                        raise
                    return  # of so few samples there is no loss
                if found is None or state.has_changed():
                    return  # there is none, or its parts would draw other random numbers
            terms.append(weight * float(found))
            eps = torch.finfo(found.dtype).eps
        whole, *both = terms
        if not all(map(math.isfinite, terms)):
            return
        if abs(whole - sum(both)) > math.sqrt(eps) * max(map(abs, terms)):
            mean = self._reduction == "mean"
            what = "weights times losses" if mean else "losses"
            problem = (
                f"the loss of batch {batch.index} is not the {self._reduction} of the losses of its first {cut} and "
                f"last {count - cut} samples: {what} are {whole:.6g} of all and {both[0]:.6g} + {both[1]:.6g} of the "
                "parts"
            )
            mend = (
                "Pass weight=, what the loss of a batch is averaged over, or reduction='sum'"
                if mean
                else "Pass reduction='mean'"
            )
            mend += (
                ". If samples of a batch influence each other (batch normalisation in training mode), or the loss "
                "has a term of the parameters alone, and that is meant, pass check_weights=False"
            )
            raise ArgumentError(message(sums.where, problem, mend))

    # ---------------------------------------------------------------------------- operators

    def hessian_operator(
        self, f: LossFn, params: Tree, *, mode: Mode = "auto", check_finite: bool = False
    ) -> LinearOperator:
        """Return the Hessian of the loss of all data, `f(params, *batch)` of a batch; else as `hessian_operator`."""
        where = "Batches.hessian_operator"
        check_callable(f, where)
        check_params(params, where)
        check_mode(mode, where)
        kind = Hessian(f, params, mode, check_finite)
        sums = self._sums(params, self._weight, where, value=kind.value, of=f)
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
        check_callable(model_fn, where, name="model_fn")
        check_callable(loss_fn, where, name="loss_fn")
        check_params(params, where)
        check_mode(mode, where)

        def model_of(batch: Batch) -> tuple[ModelFn, LossFn, Any, Any]:
            return model_fn, loss_fn, *pair(batch, where)

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=True)
        sums = self._sums(params, self._weight, where, value=kind.value, of=loss_fn)
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
        check_callable(model_fn, where, name="model_fn")
        check_likelihood(likelihood, where)
        check_params(params, where)
        check_mode(mode, where)
        seed = None if num_samples is None else self._agreed(draw_seed(generator))

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
        sums = self._sums(params, self._instead_of(entries), where, multiplies=False)
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
        check_callable(model_fn, where, name="model_fn")
        check_callable(loss_fn, where, name="loss_fn")
        check_params(params, where)
        check_mode(mode, where)

        def model_of(batch: Batch) -> tuple[ModelFn, LossFn, Any, Any]:
            functions = model_fn, loss_fn, params
            return empirical_fisher_model(
                *functions, *pair(batch, where), reduction="sum", where=where
            )

        def losses(args: Args) -> float:
            return float(number_of_losses(model_of(Batch(0, args, 0)), params))

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=False)
        sums = self._sums(params, self._instead_of(losses), where, multiplies=False)
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
        return operator_over(Other(make, like), self._sums(like, self._weight, where), like)

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
        dtypes = []

        def value_of(batch: Batch) -> Tensor:
            loss = flat_loss(f, params, batch.args, {}, has_aux=False, where=where)
            return checked_scalar(loss.eager(), where)

        def add_loss(batch: Batch, add: Add) -> None:
            if not gradient:
                with torch.no_grad():
                    value = value_of(batch)
                found: list[Tensor] = []
            else:
                loss = flat_loss(f, params, batch.args, {}, has_aux=False, where=where)
                with out_of_inference_mode():
                    value, pull, _ = vjp_aux(loss.at(forward=False, higher=False), loss.leaves)
                    found = [g.detach() for g in pull(torch.ones_like(value))[0]]
            dtypes.append(value.dtype)
            add([value.detach().double(), *found])

        sums = self._sums(params, self._weight, where, value=value_of, of=f)
        leaves, _ = tree.flatten(params)
        number = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
        zeros = [wide_zeros(leaf) for leaf in leaves] if gradient else []
        value, *rest = sums.over(where, [number, *zeros], add_loss)
        return value.to(dtypes[0] if dtypes else leaves[0].dtype), rest


class _Stream:
    """Random numbers that are drawn while data are read: the same whenever they are, and nobody else's."""

    def __init__(
        self, state: RandomState, generators: Sequence[torch.Generator], states: Sequence[Tensor]
    ) -> None:
        self._state, self._generators, self._states = state, generators, list(states)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw inside from where this stream is; leave all generators as they are outside."""
        present = RandomState.now([])
        others = [generator.get_state() for generator in self._generators]
        self._state.restore()
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            self._state = RandomState.now([])
            self._states = [generator.get_state() for generator in self._generators]
            present.restore()
            for generator, state in zip(self._generators, others, strict=True):
                generator.set_state(state)


def _generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader, its samplers and its data sets hold."""
    found: list[torch.Generator] = []
    pending, seen = [data], set()
    while pending:
        owner = pending.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, torch.Generator) and all(value is not g for g in found):
                found.append(value)
            elif name in _HOLDERS:
                pending.extend(value if isinstance(value, (list, tuple)) else [value])
    return found


_HOLDERS = {"dataset", "datasets", "sampler", "batch_sampler", "data_source"}
