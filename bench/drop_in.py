"""Is every function of the drop-in at least as fast as the package's?

Command: `python -m bench drop_in` (`--quick` only sees that it runs).

Expected story, written before the first run of this file. On the baseline MLP one backward pass is one backward
pass: `vjp` and the Fisher functions should tie, up to what the rules cost around the evaluation (some hundredths of
it), as should one Hessian product. Whatever the package loops over, outputs, vectors, probes or entries, should be
faster by the length of the loop or by what a vectorised sweep gains over it: `jvp` and the Gauss-Newton product by
hundreds, batches, Jacobians and diagonals of a model of 10,000 parameters by 10 to 100, its trace by random probes
by 2 to 3, eigenvalues by 2 to 4 because an operator pays once and Lanczos stops when it has converged. A surface of
the loss is bound by its forward passes: a tie on the MLP, a gain where overhead counts. Power iteration has not
converged in its 100 steps on such a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import (
    Candidate,
    Run,
    UnavailableError,
    compare,
    described,
    gradient,
    leaves,
    relative_error,
)
from bench.oracles import gauss_newton
from bench.problems import Problem, problem

QUESTION = "Is every function of the drop-in at least as fast as the package's?"
NOTES = (
    "The error is that of ours in float32 against the package's answer in float64 where the package is right, else "
    "against plain autograd in float64.",
    "Power iteration has not converged after its 100 steps by either package: the top eigenvalues are close.",
    "gauss_newton_product of the package returns zeros, after taking as many backward passes as there are outputs.",
)
OURS, PACKAGE = "secorder_func.compat", "torch_secorder"


@dataclass(frozen=True)
class Row:
    """One function and its arguments.

    Parameters
    ----------
    function
        Its place below either package.
    arguments
        Problem -> positional arguments, made of the problem's own tensors.
    truth
        Problem in float64 -> the answer, if not the package's.
    tolerance
        Of the relative error of ours.
    """

    function: str
    arguments: Callable[[Problem], tuple[Any, ...]]
    truth: Callable[[Problem], Any] | None = None
    tolerance: float = 1e-4
    what: str = ""

    @property
    def name(self) -> str:
        return self.function.rpartition(".")[2] + self.what


def _loss(p: Problem) -> tuple[Any, ...]:
    return p.closure, p.parameters


def _output(p: Problem) -> Callable[[], Tensor]:
    return lambda: p.model(p.inputs)


def _cotangents(p: Problem, count: int) -> Tensor:
    shape = p.model(p.inputs).shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator).to(p.vector[0].dtype)


def _data(p: Problem) -> tuple[Any, ...]:
    return p.model, p.loss_fn, p.inputs, p.targets


def _regression(p: Problem) -> tuple[Any, ...]:
    return p.model, nn.MSELoss(), p.inputs, F.one_hot(p.targets, 10).to(p.vector[0].dtype)


def _outputs(p: Problem) -> tuple[Any, ...]:
    return p.model, p.model(p.inputs), p.targets


def _of_model(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), targets)


def _eigen(p: Problem, **options: Any) -> tuple[Any, ...]:
    return p.model, _of_model, p.inputs, p.targets, options.get("k", 1), options["method"]


def _top_eigenvalue(p: Problem) -> Tensor:
    """Return it by power iteration with plain products, until nothing changes."""
    v = [t / torch.cat([u.flatten() for u in p.vector]).norm() for t in p.vector]
    gradient = torch.autograd.grad(p.closure(), p.parameters, create_graph=True)
    value = torch.zeros(())
    for _ in range(1000):
        product = torch.autograd.grad(gradient, p.parameters, v, retain_graph=True)
        flat = torch.cat([h.flatten() for h in product])
        value = flat.norm()
        v = [h / value for h in product]
    return value


def _surface(p: Problem, directions: int) -> tuple[Any, ...]:
    return *_data(p), *[list(v) for v in (p.vector, _twisted(p))[:directions]]


def _twisted(p: Problem) -> list[Tensor]:
    return [v.flip(0) for v in p.vector]


ON_BOTH = (
    Row("core.hvp.exact_hvp", lambda p: (*_loss(p), list(p.vector))),
    Row("core.hvp.model_hvp", lambda p: (*_data(p), list(p.vector))),
    Row(
        "core.hvp.gauss_newton_product",
        lambda p: (*_data(p), list(p.vector)),
        gauss_newton,
    ),
    Row("core.gvp.jvp", lambda p: (*_loss(p), list(p.vector)), what=", scalar output"),
    Row("core.gvp.vjp", lambda p: (_output(p), p.parameters, _cotangents(p, 1)[0])),
    Row("core.gvp.model_vjp", lambda p: (p.model, p.inputs, _cotangents(p, 1)[0])),
    Row("core.gvp.model_jvp", lambda p: (p.model, p.inputs, list(p.vector))),
    Row("core.per_layer_curvature.per_layer_fisher_diagonal", _data),
    Row("approximations.fisher_diagonal.empirical_fisher_diagonal", _data),
    Row("approximations.fisher_trace.empirical_fisher_trace", _data),
    Row("approximations.fisher_diagonal.generalized_fisher_diagonal", _outputs),
    Row("approximations.fisher_trace.generalized_fisher_trace", _outputs),
    Row("analysis.landscape.compute_loss_surface_1d", lambda p: _surface(p, 1)),
    Row("analysis.landscape.compute_loss_surface_2d", lambda p: _surface(p, 2)),
    Row(
        "analysis.eigensolvers.model_eigenvalues",
        lambda p: _eigen(p, method="lanczos"),
        _top_eigenvalue,
        what=", Lanczos",
    ),
    Row(
        "analysis.eigensolvers.model_eigenvalues",
        lambda p: _eigen(p, method="power_iteration"),
        _top_eigenvalue,
        tolerance=1e-1,
        what=", power iteration",
    ),
)
BASELINE = (
    *ON_BOTH,
    Row(
        "core.gvp.batch_vjp",
        lambda p: (_output(p), p.parameters, _cotangents(p, 8)),
        what=", 8 vectors",
    ),
    Row(
        "core.gvp.batch_jvp", lambda p: (*_loss(p), p.vectors(8)), what=", 8 vectors, scalar output"
    ),
    Row("core.utils.flatten_params", lambda p: (p.parameters,)),
)
SMALL = (
    *ON_BOTH,
    Row(
        "core.gvp.batch_vjp",
        lambda p: (_output(p), p.parameters, _cotangents(p, 256)),
        what=", 256 vectors",
    ),
    Row(
        "core.gvp.batch_jvp",
        lambda p: (_output(p), p.parameters, p.vectors(256)),
        what=", 256 vectors",
    ),
    Row("core.gvp.full_jacobian", lambda p: (_output(p), p.parameters)),
    Row("core.hessian_diagonal.hessian_diagonal", _loss),
    Row("core.hessian_diagonal.model_hessian_diagonal", _data),
    Row("core.hessian_trace.hessian_trace", _loss),
    Row("core.per_layer_curvature.per_layer_hessian_diagonal", _data),
    Row("approximations.gauss_newton.gauss_newton_matrix_approximation", _regression),
)


def _function(package: str, row: Row) -> Callable[..., Any]:
    module, _, name = row.function.rpartition(".")
    try:
        return getattr(import_module(f"{package}.{module}"), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{package} is not installed") from error


def _candidate(package: str, row: Row) -> Candidate:
    def make(p: Problem) -> Run:
        function, arguments = _function(package, row), row.arguments(p)
        return lambda: function(*arguments)

    return Candidate(package, make, peer=package == PACKAGE)


def _measured(p: Problem, row: Row, seconds: float) -> dict[str, Any]:
    wide = p.double()
    answer = row.truth(wide) if row.truth else _function(PACKAGE, row)(*row.arguments(wide))
    truth = leaves(answer)

    def check(result: Any) -> float:
        return relative_error(leaves(result)[: len(truth)], [t.double() for t in truth])

    records = compare(
        p,
        gradient(p),
        [_candidate(OURS, row), _candidate(PACKAGE, row)],
        check,
        tolerance=row.tolerance,
        seconds=seconds,
    )
    return {
        **described(p, records),
        "name": row.name,
        "description": f"{row.name}, {p.name}",
        "problem": p.name,
    }


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the records of every function on the baseline MLP and on the small one."""
    seconds = 0.2 if quick else 3.0
    step = 8 if quick else 1
    both = ((problem("mlp"), BASELINE[::step]), (problem("small"), SMALL[::step]))
    with warnings.catch_warnings():
        # 100 steps of power iteration are not enough here, as ours says.
        warnings.filterwarnings("ignore", ".*not converged", UserWarning)
        found = [_measured(p, row, seconds) for p, rows in both for row in rows]
    return {"question": QUESTION, "notes": NOTES, "problems": found}
