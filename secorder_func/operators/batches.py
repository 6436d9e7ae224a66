"""Whole data sets: operators, losses and gradients that are sums over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.checks import check_callable, check_params
from secorder_func.digest import digest
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.operators.batch_forms import BatchForms, BatchRows
from secorder_func.operators.batch_kinds import GaussNewton, Hessian, Kind, Other, pair
from secorder_func.operators.batch_sums import Add, Args, Batch, BatchSums
from secorder_func.operators.fisher import (
    empirical_fisher_model,
    fisher_model,
    number_of_entries,
    number_of_losses,
)
from secorder_func.operators.linear_operator import LinearOperator
from secorder_func.operators.ranks import Ranks, mark_of
from secorder_func.operators.versions import Versions
from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import vjp_aux
from secorder_func.seeds import draw_seed
from secorder_func.transforms.fisher import Reduction, check_likelihood, check_reduction
from secorder_func.transforms.likelihoods import Likelihood
from secorder_func.transforms.loss import checked_scalar, flat_loss
from secorder_func.transforms.policy import check_mode, differentiated_outside, in_transform
from secorder_func.typing import LossFn, Mode, ModelFn, Tree

__all__ = ["Batches"]

Weight: TypeAlias = "Callable[..., float | Tensor]"
T = TypeVar("T")
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
        Whether to split the first batch in two and refuse weights and a reduction that contradict the three losses; see
        Notes.
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
    is not the sum or mean of its samples. Then the split of the first batch shows that, and what is computed depends on
    the batches; pass `check_weights=False` if that is meant.

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

    # ------------------------------------------------------------------------------ reading

    @property
    def length(self) -> int | None:
        """How many batches there are, None if that is not known before."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:  # an iterable data set behind a loader
            return None

    def read(self, device: torch.device | None = None, /) -> Iterator[Args]:
        """Yield the batches, in the same order with the same random numbers whenever they are read."""
        with self._rewound():
            stream = [self._random]
            iterator = _drawing(stream, lambda: iter(self._data))
            while True:
                batch = _drawing(stream, lambda: next(iterator, _END))
                if batch is _END:
                    return
                yield self._prepared(batch, device)

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

    @contextmanager
    def _rewound(self) -> Iterator[None]:
        """Put the generators of the loader back to where they were, and leave them as they are now."""
        present = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            for generator, state in zip(self._generators, present, strict=True):
                generator.set_state(state)

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
        sums = self._sums(params, self._weight) if f is not None else None
        device = None if sums is None else sums.device
        seen: list[str] = []
        for index, batch in enumerate(self.read(device)):
            seen.append(digest(tree.tensors_in(batch)))
            if f is not None and sums is not None:
                values = []
                for _ in range(2):
                    with sums.randomness(Batch(index, batch, index)).replayed(), torch.no_grad():
                        values.append(f(params, *batch))
                first, second = (float(value) for value in values)
                if first != second and not (math.isnan(first) and math.isnan(second)):
                    problem = f"the loss of batch {index} is {first!r} and then {second!r}"
                    mend = "Seed what it draws, other than by torch, from its arguments"
                    raise RuntimeError(message(where, problem, mend))
        index = -1
        for index, batch in enumerate(self.read(device)):
            if index >= len(seen) or digest(tree.tensors_in(batch)) != seen[index]:
                problem = f"batch {index} is another one when the data are read again"
                mend = "Seed what shuffles or augments the data other than by torch, or store them"
                raise RuntimeError(message(where, problem, mend))
        if index + 1 < len(seen):
            problem = f"there are {len(seen)} batches, and {index + 1} when the data are read again"
            raise RuntimeError(message(where, problem))

    # ---------------------------------------------------------------------------- weighting

    def _weight(self, args: Args) -> float:
        """Return what the loss of a batch was averaged over."""
        if self._user_weight is None:
            return self._number_of_samples(args)
        return self._users(args)

    def _users(self, args: Args) -> float:
        assert self._user_weight is not None
        weight: Any = self._user_weight(*args)
        if isinstance(weight, Tensor) and weight.numel() != 1:
            problem = f"weight must return a number, got shape {tuple(weight.shape)}"
            raise ArgumentError(message("Batches", problem, "Sum it"))
        number = float(weight)
        if not 0 <= number < math.inf:
            problem = f"weight must return a number from 0 on, got {number}"
            raise ArgumentError(message("Batches", problem))
        return number

    def _number_of_samples(self, args: Args) -> float:
        tensors = tree.tensors_in(args)
        mend = "Pass weight=, what the loss of a batch is averaged over"
        if not tensors or not tensors[0].ndim:
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
        self, params: Tree, weight: Callable[[Args], float], *, multiplies: bool = True
    ) -> BatchSums:
        leaves = tuple(tree.flatten(params)[0])
        weight_of = weight if self._reduction == "mean" else None
        return BatchSums(self, leaves, weight_of, multiplies, self._ranks)

    def _agreed(self, seed: int) -> int:
        return seed if self._ranks is None else int(self._ranks.agree(seed))

    def _require_right_weights(
        self, value: Callable[[Batch], Tensor | None], sums: BatchSums
    ) -> None:
        """Refuse weights and a reduction that the losses of the parts of a batch contradict."""
        if not self._check_weights:
            return
        first = sums.first()
        if first is None:
            return
        tensors, restore = tree.tensors_and_rest(first.args)
        counts = {t.shape[0] if t.ndim else 0 for t in tensors}
        count = counts.pop() if len(counts) == 1 else 0
        if count < 2:
            return  # it cannot be split
        cut = max(count // 3, min(2, count // 2))  # of one alone some losses are not defined
        halves = [restore([t[rows] for t in tensors]) for rows in (slice(cut), slice(cut, None))]
        state = sums.randomness(first)
        terms = []
        for args in (first.args, *halves):
            weight = self._weight(args) if self._reduction == "mean" else 1.0
            with state.replayed(), torch.no_grad():
                try:
                    found = value(replace(first, args=args)) if weight else torch.zeros(())
                except Exception:
                    if args is first.args:
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
            what = "weights times losses" if self._reduction == "mean" else "losses"
            problem = (
                f"the loss of the first batch is not the {self._reduction} of the losses of its first {cut} and last "
                f"{count - cut} samples: {what} are {whole:.6g} of all and {both[0]:.6g} + {both[1]:.6g} of the parts"
            )
            mend = (
                "Pass weight=, what the loss of a batch is averaged over, or the other reduction=. If samples of a "
                "batch influence each other (batch normalisation in training mode), or the loss has a term of the "
                "parameters alone, and that is meant, pass check_weights=False"
            )
            raise ArgumentError(message("Batches", problem, mend))

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
        sums = self._sums(params, self._weight)
        self._require_right_weights(kind.value, sums)
        return _operator(kind, sums, params)

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
        sums = self._sums(params, self._weight)
        self._require_right_weights(kind.value, sums)
        return _operator(kind, sums, params)

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
            if self._user_weight is not None:
                return self._users(args)
            return float(number_of_entries(model_fn, likelihood, params, args[0], where))

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=False)
        return _operator(kind, self._sums(params, entries, multiplies=False), params)

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
            if self._user_weight is not None:
                return self._users(args)
            return float(number_of_losses(model_of(Batch(0, args, 0)), params))

        kind = GaussNewton(model_of, params, mode, check_finite, has_loss=False)
        return _operator(kind, self._sums(params, losses, multiplies=False), params)

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
        return _operator(Other(make), self._sums(like, self._weight), like)

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
        params = tree.map(Tensor.detach, params)
        sums = self._sums(params, self._weight)
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

        self._require_right_weights(value_of, sums)
        leaves, _ = tree.flatten(params)
        number = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
        zeros = [_wide_zeros(leaf) for leaf in leaves] if gradient else []
        value, *rest = sums.over(where, [number, *zeros], add_loss)
        return value.to(dtypes[0] if dtypes else leaves[0].dtype), rest


def _operator(kind: Kind, sums: BatchSums, params: Tree) -> LinearOperator:
    """Return the operator whose every product is a pass."""
    leaves, unflatten = tree.flatten(params)
    versions = Versions(leaves)

    def mark(vectors: Tree) -> float:
        return 0.0 if sums.ranks is None else mark_of(tree.flatten(vectors)[0])

    def several(batch: Batch) -> LinearOperator:
        op = kind.operator(batch)
        known = sums.memory.setdefault("bytes", {})
        shapes = str([tuple(t.shape) for t in tree.tensors_in(batch.args)])
        op._bytes.update(known.setdefault(shapes, {}))
        known[shapes] = op._bytes
        return op

    def matvec(v: Tree) -> Tree:
        versions.require_unchanged()

        def add_product(batch: Batch, add: Add) -> None:
            add(tree.flatten(kind.product(batch, v))[0])

        zeros = [_wide_zeros(leaf) for leaf in leaves]
        totals = sums.over("a product", zeros, add_product, mark=mark(v))
        return unflatten([t.to(leaf.dtype) for t, leaf in zip(totals, leaves, strict=True)])

    def matmat(vectors: Tree) -> Tree:
        versions.require_unchanged()
        stacks = tree.flatten(vectors)[0]
        count = stacks[0].shape[0]
        whole = differentiated_outside(vectors, params) or in_transform()

        def add_products(batch: Batch, add: Add) -> None:
            if count == 1:
                product = kind.product(batch, tree.map(lambda leaf: leaf[0], vectors))
                add([leaf.unsqueeze(0) for leaf in tree.flatten(product)[0]])
                return
            op = several(batch)
            if whole:
                add(tree.flatten(op.mm(vectors))[0])
                return
            chunks = op.chunks("auto", None, "LinearOperator.mm")
            take = _taking(vectors)
            for rows, product in chunks.map(take, lambda some, rows: (rows, op._mm(some)), count):
                add(tree.flatten(product)[0], rows)

        zeros = [_wide_zeros(leaf, count) for leaf in leaves]
        totals = sums.over(f"{count} products", zeros, add_products, mark=mark(vectors))
        return unflatten([t.to(leaf.dtype) for t, leaf in zip(totals, leaves, strict=True)])

    def quadratic(vectors: Tree) -> Tensor:
        versions.require_unchanged()
        found = None if forms is None else forms.of(vectors)
        if found is not None:
            return found.to(number)
        count = tree.flatten(vectors)[0][0].shape[0]
        if differentiated_outside(vectors, params) or in_transform():
            return tree.batched_dot(vectors, matmat(vectors))

        def add_forms(batch: Batch, add: Add) -> None:
            if count == 1:
                v = tree.map(lambda leaf: leaf[0], vectors)
                add([tree.dot(v, kind.product(batch, v)).detach().reshape(1)])
                return
            op = several(batch)
            chunks = op.chunks("auto", None, "LinearOperator.quadratic_forms")
            work = chunks.map(
                _taking(vectors), lambda some, rows: (rows, op.quadratic_forms(some)), count
            )
            for rows, part in work:
                add([part.detach()], rows)

        zeros = torch.zeros(count, dtype=torch.float64, device=leaves[0].device)
        return sums.over(f"{count} forms", [zeros], add_forms, mark=mark(vectors))[0].to(number)

    def on_first(v: Tree) -> Tree:
        batch = sums.first()
        if batch is None:
            return tree.zeros_like(like)
        with sums.randomness(batch).replayed():
            return kind.product(batch, v)

    like = tree.map(Tensor.detach, params)
    number = torch.promote_types(tree.common_dtype(like), torch.float32)
    outside = differentiated_outside(params)
    forms = None
    rows = None
    if not (outside or in_transform()):
        forms = BatchForms(sums, kind.forms, tuple(tree.flatten(like)[0]))
        rows = None if isinstance(kind, Hessian) else BatchRows(sums, kind, like)
    return LinearOperator(
        matvec=matvec,
        like=like,
        matmat=matmat,
        quadratic=quadratic,
        forms=forms,
        rows=rows,
        passes=True,
        witness=LinearOperator(on_first, like),
        ranks=sums.ranks,
    )


def _wide_zeros(leaf: Tensor, *axes: int) -> Tensor:
    """Return where to sum up what is like a leaf, in single precision at least."""
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    return torch.zeros((*axes, *leaf.shape), dtype=dtype, device=leaf.device)


def _taking(vectors: Tree) -> Callable[[slice], Tree]:
    return lambda rows: tree.map(lambda leaf: leaf[rows], vectors)


def _drawing(stream: list[RandomState], read: Callable[[], T]) -> T:
    """Read with the random numbers of a stream of its own, which goes on."""
    present = RandomState.now([])
    stream[0].restore()
    try:
        return read()
    finally:
        stream[0] = RandomState.now([])
        present.restore()


def _generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers draw from."""
    samplers = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    found: list[torch.Generator] = []
    for owner in (*samplers, getattr(samplers[2], "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found
