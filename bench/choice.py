"""Which method has a trace, or a diagonal, to a given error first, on networks that were trained?

Command: `python -m bench choice` (`--quick` only sees that it runs).

Networks of one hidden layer of tanh that read 1,437 digits of scikit-learn, after 200 steps of Adam: 32 hidden units
(2,410 parameters) and 256 (19,210), in float32. Truths are closed forms in float64. Errors are relative, of diagonals
in the Euclidean norm, and root mean squares over seeds; times are those of a whole call on an operator that is made
before, in gradients. From both follows what an error costs, on a line in the logarithms between two counts.

Expected story, written before the first run of this file. The spectra decay: most eigenvalues are within 1 % of the
largest. Trace of the Hessian: a probe costs 0.6 gradients, and 64 of them give 5 %, so that Hutchinson has 5 % after 45
gradients and 1 % after 1,100. XTrace pays 2 gradients a product and has 5 % with 32 products, 65 gradients, and 1 %
with 80, 160: Hutchinson is first to 5 %, XTrace to 1 %. Of Gauss-Newton XNysTrace is better, 5 % with 16 products, 1 %
with 48. But with ten outputs the exact trace of Gauss-Newton takes about 10 gradients: nothing that is random is worth
its while. The exact trace of the Hessian takes a form for each parameter, 1,500 gradients and 12,000: beyond 1 % of the
small network it is first. Diagonals: one probe of Hutchinson's is off by 3 times the norm of the diagonal, so that 5 %
takes 3,600 products, more than there are parameters in the small network; XDiag has 5 % with 128 products or 250
gradients; exact is again 10 gradients for Gauss-Newton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secorder_func as sf
from bench.harness import Candidate, compare, rounded
from secorder_func import tree
from secorder_func.report import digits

__all__ = ["QUESTION", "Method", "Network", "diagonals", "measure", "trained"]

QUESTION = "Which method has a trace, or a diagonal, to a given error first, on networks that were trained?"
NOTES = (
    "Networks that read the digits of scikit-learn, with one hidden layer of tanh and ten outputs, after 200 steps of "
    "Adam; float32; operators are made before.",
    "Errors are relative, of diagonals in the Euclidean norm, and root mean squares over seeds; truths are closed "
    "forms. What an error costs is read off a straight line in the logarithms between two counts.",
)
_EXACT = 1e-4  # in float32
_STATED = 2.5  # how far a stated standard error may be from the error over the seeds, as a factor


@dataclass(frozen=True)
class Method:
    """An estimator with its counts of products; or an exact function, without counts."""

    function: Callable[..., Any]
    of: str
    counts: tuple[int, ...] = ()
    semidefinite: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__


METHODS = (
    Method(sf.hutchinson_trace, "trace", (16, 64, 256, 1024)),
    Method(sf.hutchpp_trace, "trace", (24, 48, 96, 192)),
    Method(sf.xtrace, "trace", (16, 32, 64, 128, 256)),
    Method(sf.xnystrace, "trace", (16, 32, 64, 128), semidefinite=True),
    Method(sf.exact_trace, "trace"),
    Method(sf.hutchinson_diagonal, "diagonal", (16, 64, 256)),
    Method(sf.xdiag, "diagonal", (16, 32, 64, 128, 256)),
    Method(sf.exact_diagonal, "diagonal"),
)


@dataclass(frozen=True, eq=False)
class Network:
    """A network that was trained, its data, and a plain gradient as the unit."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            F.cross_entropy(self.model(self.inputs), self.labels), self.parameters
        )

    def operator(self, kind: str) -> sf.LinearOperator:
        model_fn, params = sf.functional_model(self.model)
        if kind == "Gauss-Newton":
            return sf.ggn_operator(model_fn, F.cross_entropy, params, self.inputs, self.labels)
        f, params = sf.functional_loss(self.model, F.cross_entropy)
        return sf.hessian_operator(f, params, self.inputs, self.labels)


def trained(name: str, hidden: int, num_train: int, num_steps: int) -> Network:
    """Return the network of the demonstration with so many hidden units."""
    generator = torch.Generator().manual_seed(0)
    data = digits.load(num_train=num_train, generator=generator)
    model = digits.make_model(hidden, generator=generator)
    digits.train(model, data, num_steps=num_steps, advance=lambda steps: None)
    return Network(name, model.float(), data.train_inputs.float(), data.train_labels)


def diagonals(network: Network) -> dict[str, dict[str, Tensor]]:
    """Return the diagonals of both matrices in closed form, in float64, by the name of the parameter."""
    W, b, V, c = (p.detach().double() for p in network.parameters)
    x, n = network.inputs.double(), len(network.inputs)
    h = torch.tanh(x @ W.T + b)
    p = (h @ V.T + c).softmax(1)
    slope = 1 - h.square()
    # Of the loss by the hidden units: the diagonal of V^T (diag(p) - p p^T) V, and the gradient.
    curved = p @ V.square() - (p @ V).square()
    gradient = (p - F.one_hot(network.labels, p.shape[1])) @ V
    of_outputs = p * (1 - p)

    def of(units: Tensor) -> dict[str, Tensor]:
        return {
            "0.weight": units.T @ x.square() / n,
            "0.bias": units.mean(0),
            "2.weight": of_outputs.T @ h.square() / n,
            "2.bias": of_outputs.mean(0),
        }

    gauss_newton = slope.square() * curved
    return {
        "Gauss-Newton": of(gauss_newton),
        "Hessian": of(gauss_newton - 2 * h * slope * gradient),
    }


def _flat(value: Any) -> Tensor:
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in tree.flatten(value)[0]])


def _calls(method: Method, op: sf.LinearOperator) -> Iterator[tuple[int, Callable[[int], Any]]]:
    """Yield every count of a method with its call, which takes a seed; zero for what is exact."""
    if not method.counts:
        yield 0, lambda seed: method.function(op)
    for count in method.counts:

        def call(seed: int, count: int = count) -> Any:
            return method.function(op, count, generator=torch.Generator().manual_seed(seed))

        yield count, call


def _errors(call: Callable[[int], Any], truth: Tensor, seeds: int) -> tuple[float, float]:
    """Return the error over the seeds and the stated one, both relative."""
    found = [call(seed) for seed in range(seeds)]
    values = torch.stack([_flat(getattr(e, "value", e)) for e in found])
    error = (values - truth).square().sum(1).mean().sqrt() / truth.norm()
    if not hasattr(found[0], "standard_error"):
        return float(error), 0.0
    variances = torch.stack([_flat(e.standard_error).square().sum() for e in found])
    return float(error), float(variances.mean().sqrt() / truth.norm())


def _require(name: str, where: str, error: float, stated: float) -> None:
    """Raise where an exact function is not, or an error is far from what was said of it."""
    honest = stated / _STATED <= error <= stated * _STATED if stated else error <= _EXACT
    if not honest:
        raise AssertionError(f"{name} of {where}: off by {error:.2g}, stated {stated:.2g}")


def _measured(
    network: Network, kind: str, of: str, seeds: int, seconds: float, most: int
) -> dict[str, Any]:
    """Return the record of a matrix and what is wanted of it, a candidate a method and count."""
    op = network.operator(kind)
    truth = _flat(diagonals(network)[kind])
    truth = truth.sum()[None] if of == "trace" else truth
    candidates: list[Candidate] = []
    facts: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        if method.of != of or (method.semidefinite and kind != "Gauss-Newton"):
            continue
        for count, call in _calls(method, op):
            if count > most:
                continue
            name = f"{method.name}, {count}" if count else method.name
            error, stated = _errors(call, truth, seeds if count else 1)
            _require(name, f"{network.name}, {kind}", error, stated)
            candidates.append(_candidate(name, call))
            facts[name] = {
                "method": method.name,
                "products": count,
                "error": rounded(error),
                "stated": rounded(stated),
            }

    def check(value: Any) -> float:
        return float((_flat(getattr(value, "value", value)) - truth).norm() / truth.norm())

    records = compare(
        network, network.gradient, candidates, check, tolerance=math.inf, seconds=seconds
    )
    return {
        "name": f"{network.name}, {kind}",
        "of": of,
        "description": f"{of} of the {kind} matrix of {network.name}",
        "parameters": network.num_parameters,
        "seeds": seeds,
        "candidates": [record | facts.get(record["name"], {}) for record in records],
    }


def _candidate(name: str, call: Callable[[int], Any]) -> Candidate:
    return Candidate(name, lambda _: lambda: call(0), read=lambda value: value)


def measure(*, quick: bool) -> dict[str, Any]:
    """Return errors and times of every method on every network."""
    networks = (
        [trained("small", 8, 300, 20)]
        if quick
        else [
            trained("narrow", 32, 1437, 200),
            trained("wide", 256, 1437, 200),
        ]
    )
    problems = [
        _measured(
            network,
            kind,
            of,
            seeds=5 if quick else 20 if network.num_parameters < 10_000 else 10,
            seconds=1.0 if quick else 40.0,
            most=32 if quick else 1024,
        )
        for of in ("trace", "diagonal")
        for network in networks
        for kind in ("Hessian", "Gauss-Newton")
    ]
    return {"question": QUESTION, "notes": NOTES, "problems": problems}
