"""Curvature of the loss of every sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from secorder_func import tree
from secorder_func.checks import check_callable, check_params
from secorder_func.errors import ArgumentError, message
from secorder_func.operators.chunks import Chunks, chunks
from secorder_func.operators.fisher import empirical_fisher_model, fisher_model
from secorder_func.operators.forms import Draw, Forms
from secorder_func.operators.per_sample_operator import PerSampleOperator
from secorder_func.operators.rows import Rows
from secorder_func.operators.versions import Versions
from secorder_func.rules.inference import out_of_inference_mode, without_inference_tensors
from secorder_func.rules.randomness import RandomState
from secorder_func.rules.torch_func import without_vmap_warnings
from secorder_func.transforms.forms import (
    checked_value,
    forms_of_samples,
    propagated_to_second_order,
)
from secorder_func.transforms.gauss_newton import flat_model, ggnvp, outputs_function
from secorder_func.transforms.hessian import hvp
from secorder_func.transforms.independence import (
    LOOKED_AT,
    fixed_normal,
    refuse_dependent_losses,
    refuse_dependent_outputs,
    watched,
)
from secorder_func.transforms.loss import Leaves, flat_loss
from secorder_func.transforms.output_space import space_of_samples
from secorder_func.transforms.policy import differentiated_outside, in_transform
from secorder_func.transforms.samples import Samples, refuse_lists_of_samples
from secorder_func.typing import ChunkSize, LossFn, Mode, ModelFn, Tree

__all__ = [
    "per_sample_empirical_fisher_operator",
    "per_sample_fisher_operator",
    "per_sample_ggn_operator",
    "per_sample_hessian_operator",
]


def per_sample_hessian_operator(
    f: LossFn,
    params: Tree,
    *batch: Any,
    mode: Mode = "auto",
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> PerSampleOperator:
    """Return the Hessian of the loss of every sample of a batch.

    Parameters
    ----------
    f
        `f(params, *batch) -> losses`, one value a sample, `(samples,)`, as by `reduction="none"`: then forms, traces
        and diagonals come by forward propagation of the whole batch, many times faster than products. Or a single
        number for the batch, a sum or a mean: every sample is then a batch of one, with the loss that it has alone.
    params
        Where, a tree.
    batch
        Trees whose tensors have a leading axis of samples. What samples share is bound to the function.
    mode
        As for `hvp`.
    chunk_size, memory_budget
        How many samples are multiplied at once; as for `LinearOperator.mm`. A propagation takes all at once, or as many
        as a number says.

    Returns
    -------
    PerSampleOperator
        `op @ v`, `op.quadratic_forms(vectors)`, `hutchinson_trace(op, ...)`, `exact_diagonal(op)`, `top_eigenpairs(op)`
        and others give a result for every sample.

    Raises
    ------
    ValueError
        Samples influence each other, as by BatchNorm in training mode; tensors of the batch have no common leading
        axis; the loss is neither one number nor one a sample, or the loss of the batch neither the sum nor the mean of
        those of its samples. Losses are compared with their first and second derivatives, for up to 16 samples.
    TypeError, NoExactRouteError
        As for `hvp`.

    Notes
    -----
    No Python loop runs over samples: they are mapped by `torch.func.vmap`. Random numbers of the loss (dropout) are
    drawn once, the same for all samples and products. A single number for the batch that draws some is not compared
    with what samples have alone.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_trace, per_sample_hessian_operator
    >>> squares = lambda p, x: (x @ p) ** 2
    >>> op = per_sample_hessian_operator(squares, torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> exact_trace(op)
    tensor([ 2., 10.])
    """
    where = "per_sample_hessian_operator"
    check_callable(f, where)
    check_params(params, where)
    samples = Samples.of(batch, where)
    refuse_lists_of_samples(batch, samples.count, where)
    params = without_inference_tensors(params)
    leaves, unflatten = tree.flatten(params)
    product = hvp(f, mode=mode)

    state = RandomState.now(leaves)

    def loss_of(at: Leaves, some: tuple[Any, ...]) -> Tensor:
        return checked_value(f(unflatten(at), *some), where)

    value, random = watched(lambda: loss_of(tuple(leaves), batch), tuple(leaves), where)
    batched = value.shape == (samples.count,)
    if not batched and value.numel() != 1:
        problem = (
            f"the loss must be one number, or one for each of {samples.count} samples, got shape "
            f"{tuple(value.shape)}"
        )
        raise ArgumentError(message(where, problem, "Sum what belongs to a sample"))
    if not in_transform():
        refuse_dependent_losses(loss_of, tuple(leaves), samples, state, random, where)

    def multiply(v: Leaves, row: Leaves) -> Leaves:
        return tuple(tree.flatten(product(params, unflatten(v), *samples.alone(row)))[0])

    forms = None
    if batched and not random:

        def of_some(
            some: tuple[Any, ...], draws: Sequence[Draw | None], count: int, groups: int
        ) -> tuple[Tensor, int]:
            loss = flat_loss(f, params, some, {}, has_aux=False, where=where)
            return propagated_to_second_order(
                loss.leaves,
                draws,
                lambda terms, at: checked_value(loss.evaluate(at), where),
                count=count,
                groups=groups,
            )

        compute = partial(_in_parts, of_some, samples, chunk_size)
        outside = differentiated_outside(params, batch)
        forms = Forms(compute, tuple(leaves), outside, data=samples.tensors)
    sizes = chunk_size, memory_budget
    return _operator(multiply, params, samples, sizes, state, mode, forms, None)


def per_sample_ggn_operator(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    inputs: Any,
    targets: Any,
    *,
    mode: Mode = "auto",
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> PerSampleOperator:
    """Return the generalised Gauss-Newton matrix `J_n^T H_n J_n` of the loss of every sample.

    Parameters
    ----------
    model_fn, loss_fn, params, inputs, targets
        As for `ggnvp`; the tensors of `inputs` and `targets` have a leading axis of samples. `loss_fn` is given a batch
        of one sample, so that its sum and its mean are the same; one value is expected.
    mode
        As for `ggnvp`.
    chunk_size, memory_budget
        As for `per_sample_hessian_operator`.

    Returns
    -------
    PerSampleOperator
        Exact traces, diagonals and eigenpairs take one backward pass for every output of a sample, where these are
        fewer than the parameters.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `per_sample_hessian_operator`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_diagonal, per_sample_ggn_operator
    >>> model = lambda p, x: torch.tanh(x @ p)
    >>> halves = lambda outputs, y: 0.5 * ((outputs - y) ** 2).sum()
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> exact_diagonal(per_sample_ggn_operator(model, halves, torch.zeros(2), x, torch.zeros(2)))
    tensor([[1., 0.],
            [1., 4.]])
    """
    return _gauss_newton(
        model_fn,
        loss_fn,
        params,
        (inputs, targets),
        mode,
        chunk_size,
        memory_budget,
        "per_sample_ggn_operator",
    )


def per_sample_fisher_operator(
    model_fn: ModelFn,
    likelihood: Callable[[Any], Any],
    params: Tree,
    inputs: Any,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
    mode: Mode = "auto",
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> PerSampleOperator:
    """Return the Fisher information of every sample, summed over its own outputs.

    Parameters
    ----------
    model_fn, likelihood, params, inputs, num_samples, generator
        As for `fisher_operator`; the tensors of `inputs` have a leading axis of samples.
    mode, chunk_size, memory_budget
        As for `per_sample_hessian_operator`.

    Returns
    -------
    PerSampleOperator
        As for `per_sample_ggn_operator`.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `fisher_operator` and `per_sample_hessian_operator`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_trace, likelihoods, per_sample_fisher_operator
    >>> model = lambda p, x: x @ p
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> exact_trace(per_sample_fisher_operator(model, likelihoods.gaussian(), torch.zeros(2), x))
    tensor([1., 5.])
    """
    where = "per_sample_fisher_operator"
    pair = fisher_model(
        model_fn,
        likelihood,
        params,
        inputs,
        num_samples=num_samples,
        generator=generator,
        reduction="sum",
        where=where,
    )
    scored, loss, inputs, targets = pair
    return _gauss_newton(
        scored, loss, params, (inputs, targets), mode, chunk_size, memory_budget, where
    )


def per_sample_empirical_fisher_operator(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    inputs: Any,
    targets: Any,
    *,
    mode: Mode = "auto",
    chunk_size: ChunkSize = "auto",
    memory_budget: int | None = None,
) -> PerSampleOperator:
    """Return `g_n g_n^T` of the gradient of the loss of every sample.

    Parameters
    ----------
    model_fn, loss_fn, params, inputs, targets
        As for `empirical_fisher_operator`: one loss a sample.
    mode, chunk_size, memory_budget
        As for `per_sample_hessian_operator`.

    Returns
    -------
    PerSampleOperator
        Its exact trace is the squared norm of every sample's gradient.

    Raises
    ------
    TypeError, ValueError, NoExactRouteError
        As for `empirical_fisher_operator` and `per_sample_hessian_operator`.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import exact_trace, per_sample_empirical_fisher_operator
    >>> model, squares = lambda p, x: x @ p, lambda outputs, y: (outputs - y) ** 2
    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.ones(2)
    >>> exact_trace(per_sample_empirical_fisher_operator(model, squares, torch.zeros(2), x, y))
    tensor([ 4., 20.])
    """
    where = "per_sample_empirical_fisher_operator"
    losses, squares, inputs, targets = empirical_fisher_model(
        model_fn, loss_fn, params, inputs, targets, reduction="sum", where=where
    )
    return _gauss_newton(
        losses, squares, params, (inputs, targets), mode, chunk_size, memory_budget, where
    )


def _gauss_newton(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    batch: tuple[Any, Any],
    mode: Mode,
    chunk_size: ChunkSize,
    memory_budget: int | None,
    where: str,
) -> PerSampleOperator:
    check_callable(model_fn, where, name="model_fn")
    check_callable(loss_fn, where, name="loss_fn")
    check_params(params, where)
    samples = Samples.of(batch, where)
    refuse_lists_of_samples(batch, samples.count, where)
    params = without_inference_tensors(params)
    leaves, unflatten = tree.flatten(params)
    product = ggnvp(model_fn, loss_fn, mode=mode)

    state = RandomState.now(leaves)

    outputs_of = outputs_function(model_fn, loss_fn, unflatten, where)
    at = tuple(leaves)
    whole = samples.restore(samples.tensors)
    outputs, random = watched(lambda: outputs_of(at, whole), at, where)
    for output in outputs:
        if output.shape[:1] != (samples.count,):
            problem = (
                f"outputs need the leading axis of the {samples.count} samples, got shape "
                f"{tuple(output.shape)}"
            )
            raise ArgumentError(message(where, problem))
    if not in_transform():
        refuse_dependent_outputs(outputs_of, at, samples, state, random, where)
        if not random:
            _refuse_dependent_loss(model_fn, loss_fn, params, samples, state, where)

    def multiply(v: Leaves, row: Leaves) -> Leaves:
        inputs, targets = samples.alone(row)
        return tuple(tree.flatten(product(params, unflatten(v), inputs, targets))[0])

    outside = differentiated_outside(params, batch)
    forms = rows = None
    if not (outside or in_transform() or any(z.is_complex() for z in outputs)):
        space = partial(space_of_samples, model_fn, loss_fn, params, samples, state, where)
        rows = Rows(space, tuple(leaves), samples.tensors)
        if not random:

            def of_some(
                some: tuple[Any, Any], draws: Sequence[Draw | None], count: int, groups: int
            ) -> tuple[Tensor, int]:
                model = flat_model(model_fn, loss_fn, params, *some, where=where)
                part = Samples.of(some, where)
                return forms_of_samples(model, loss_fn, part, draws, count, groups)

            compute = partial(_in_parts, of_some, samples, chunk_size)
            forms = Forms(compute, tuple(leaves), outside, data=samples.tensors)
    sizes = chunk_size, memory_budget
    return _operator(multiply, params, samples, sizes, state, mode, forms, rows)


def _refuse_dependent_loss(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Tree,
    samples: Samples,
    state: RandomState,
    where: str,
) -> None:
    """Refuse a loss whose Hessian in the outputs of a batch is not that of its samples alone."""
    some = samples.some(LOOKED_AT)
    model = flat_model(model_fn, loss_fn, params, *some.restore(some.tensors), where=where)
    with state.replayed(), out_of_inference_mode(), torch.no_grad():
        smooth, others = model.outputs_at(forward=False, higher=False)(model.leaves)
    ways = fixed_normal(smooth)
    parts = (smooth, ways, others, some.tensors)
    ends = [sum(map(len, parts[: i + 1])) for i in range(4)]
    held = Samples(tuple(t for part in parts for t in part), tuple)

    def loss_of(step: Leaves, tensors: Leaves) -> Tensor:
        """Return the loss where the outputs of every sample are moved in a direction of its own."""
        moved = tuple(
            z + step[0].to(z) * way
            for z, way in zip(tensors[: ends[0]], tensors[ends[0] : ends[1]], strict=True)
        )
        outputs = model.assembled(moved, tuple(tensors[ends[1] : ends[2]]))
        return checked_value(loss_fn(outputs, some.restore(tensors[ends[2] :])[1]), where)

    if not smooth[0].numel():
        return
    step = torch.zeros_like(smooth[0].real.flatten()[0])
    refuse_dependent_losses(loss_of, (step,), held, state, False, where)


def _in_parts(
    of_some: Callable[..., tuple[Tensor, int]],
    samples: Samples,
    chunk_size: ChunkSize,
    draws: Sequence[Draw | None],
    count: int,
    groups: int,
) -> tuple[Tensor, int]:
    """Return the forms of all samples, `(groups, samples)`, so many samples at once as were asked for."""
    size = None if chunk_size in (None, "auto") else int(chunk_size)
    parts = [
        of_some(samples.batch(rows), draws, count, groups)
        for rows in chunks(samples.count, size, "PerSampleOperator")
    ]
    return torch.cat([sums for sums, _ in parts], 1), max(taken for _, taken in parts)


def _operator(
    multiply: Callable[[Leaves, Leaves], Leaves],
    params: Tree,
    samples: Samples,
    sizes: tuple[ChunkSize, int | None],
    state: RandomState,
    mode: str,
    forms: Forms | None,
    rows: Rows | None,
) -> PerSampleOperator:
    """Return the operator of `multiply(vector, tensors of one sample)`."""
    leaves, unflatten = tree.flatten(params)
    chunk_size, memory_budget = sizes
    versions = Versions(leaves, samples.tensors)
    taken: dict[str, int] = {}
    entries = tree.numel(params)

    def form(v: Leaves, row: Leaves) -> Tensor:
        pairs = zip(v, multiply(v, row), strict=True)
        parts = [(a * b).sum() for a, b in pairs]
        return torch.stack([part.to(parts[0]) for part in parts]).sum()

    def over_samples(
        work: Callable[..., Any], given: Leaves, chosen: Samples, count: int, *, own: bool
    ) -> Any:
        """Map over chunks of samples; `given` are the vectors, of each sample its own or `count` for all."""
        versions.require_unchanged()
        pieces = Chunks(
            chunk_size,
            memory_budget,
            f"PerSampleOperator, {count} vectors",
            device=leaves[0].device,
            entries=entries * count,
            known=taken,
        )

        def taking(chunk: slice) -> tuple[Leaves, Leaves]:
            return tuple(t[chunk] for t in given) if own else given, chosen.rows(chunk)

        def working(both: tuple[Leaves, Leaves], chunk: slice) -> Any:
            with state.replayed(), out_of_inference_mode(), without_vmap_warnings():
                return work(*both)

        found = list(pieces.map(taking, working, chosen.count))
        return tree.map(lambda *parts: torch.cat(parts, 0 if own else 1), *found)

    def shared(work: Callable[[Leaves, Leaves], Any]) -> Callable[[Tree], Any]:
        one = vmap(work, in_dims=(None, 0), randomness="same")
        mapped = vmap(one, in_dims=(0, None), randomness="same")

        def single(given: Leaves, row: Leaves) -> Any:
            """Take the only vector, for which another level of vmap would double the time."""
            found = one(tuple(t[0] for t in given), row)
            return tree.map(lambda t: t.unsqueeze(0), found)

        def apply(vectors: Tree) -> Any:
            given = tuple(tree.flatten(without_inference_tensors(vectors))[0])
            count = given[0].shape[0]
            together = single if count == 1 else mapped
            return over_samples(together, given, samples, count, own=False)

        return apply

    def each(vectors: Tree, among: slice) -> Tree:
        given = tuple(tree.flatten(without_inference_tensors(vectors))[0])
        chosen = Samples(samples.rows(among), samples.restore)
        mapped = vmap(multiply, randomness="same")
        return unflatten(over_samples(mapped, given, chosen, 1, own=True))

    several = shared(multiply)
    return PerSampleOperator(
        several=lambda vectors: unflatten(several(vectors)),
        each=each,
        like=tree.map(Tensor.detach, params),
        num_samples=samples.count,
        quadratic=shared(form),
        forms=forms,
        rows=rows,
        mode=mode,
    )
