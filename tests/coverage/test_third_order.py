"""Third derivatives are right, or refused by name; never a wrong number.

The fast part has the functions that torch gets wrong, each in the compositions in which it does, and a spread of common
functions and layers. The slow part has every module and operator of torch's databases in every composition.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

from secorder_func import NoExactRouteError, hessian_operator, hvp
from secorder_func.compat.core.hvp import exact_hvp
from secorder_func.rules import wrong_third
from tests import oracles
from tests.coverage.problems import Problem, module_problems, operator_problems
from tests.coverage.reference import direction, flat
from tests.coverage.third_order import (
    PROPAGATED,
    RAW,
    ROUTES,
    smooth_direction,
    third_truth_of,
    verdict,
)

_g = torch.Generator().manual_seed(0)
INF = float("inf")


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_g)


def _of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A function of tensors, a raw composition of torch that is wrong, and the routes that refuse it."""

    f: Callable[..., Tensor]
    at: tuple[Tensor, ...]
    wrong: str = ""
    refused: str = ""
    """The routes, an abbreviation of `REFUSING`."""
    named: str = ""
    """What the refusal names."""

    def problem(self, name: str) -> Problem:
        params = {str(i): t.clone().requires_grad_() for i, t in enumerate(self.at)}

        def f(tensors: Any) -> Tensor:
            output = self.f(*(tensors[str(i)] for i in range(len(self.at))))
            weights = torch.cos(torch.arange(1.0, output.numel() + 1, dtype=torch.float64))
            return (output.reshape(-1) * weights).sum() + (output**3).sum()

        return Problem(name, name, params, f, lambda: f(params))


INNER_FORWARD = {"hvp of jvp", "reverse hvp of jvp"}
REFUSING = {
    "": set(),
    "forward that is differentiated by reverse": {"grad of forward hvp", *INNER_FORWARD},
    "forward that is differentiated": {
        "grad of forward hvp",
        "jvp of forward hvp",
        *INNER_FORWARD,
    },
    "grad of jvp of grad": {"grad of forward hvp"},
    "all": set(ROUTES),
}

REVERSE, REVERSE_FORWARD = "grad(vjp(grad))", "grad(jvp(grad))"
_A, _B, _Q = _randn(3, 3), _randn(3, 2), _randn(1, 3, 4)
_ZEROS = _of(0.0, 1.0, -1.0, 2.0)
_IDLE = torch.tensor([[False, False, False], [False, True, True], [True, True, True]])


def _spd(x: Tensor) -> Tensor:
    return x @ x.T + 2 * torch.eye(len(x), dtype=x.dtype)


RULED: dict[str, Case] = {
    "layer_norm": Case(lambda x, w: F.layer_norm(x, (3,), w), (_A, _of(1, 2, 3)), REVERSE),
    "batch_norm": Case(
        lambda x, w: F.batch_norm(x, None, None, w, training=True), (_A, _of(1, 2, 3)), REVERSE
    ),
    "instance_norm": Case(lambda x: F.instance_norm(x[None]), (_A,), REVERSE),
    "native_batch_norm": Case(
        lambda x, w: torch.native_batch_norm(x, w, None, None, None, True, 0.1, 1e-5)[0],
        (_A, _of(1, 2, 3)),
        REVERSE,
    ),
    "native_layer_norm": Case(
        lambda x, w: torch.native_layer_norm(x, (3,), w, None, 1e-5)[0], (_A, _of(1, 2, 3)), REVERSE
    ),
    "weight_norm": Case(
        lambda v: torch._weight_norm(v, v[:, :1], 0),
        (_A,),
        REVERSE,
        "grad of jvp of grad",
        "weight_norm",
    ),
    "det": Case(torch.linalg.det, (_A,), REVERSE),
    "det in forward mode": Case(torch.det, (_A,), REVERSE_FORWARD),
    "slogdet": Case(lambda A: torch.linalg.slogdet(A)[1], (_A,), REVERSE_FORWARD),
    "slogdet method": Case(lambda A: A.slogdet().logabsdet, (_A,), REVERSE_FORWARD),
    "slogdet of complex matrices": Case(
        lambda A, B: torch.view_as_real(torch.slogdet(torch.complex(A, B))[0]),
        (_A, _randn(3, 3)),
        REVERSE_FORWARD,
    ),
    "logdet of a batch": Case(
        lambda A: torch.logdet(torch.stack([_spd(A), 2 * _spd(A)])), (_A,), REVERSE_FORWARD
    ),
    "solve": Case(torch.linalg.solve, (_A, _B), REVERSE_FORWARD),
    "solve for a vector": Case(torch.linalg.solve, (_A, _randn(3)), REVERSE_FORWARD),
    "solve for a batch of vectors": Case(
        torch.linalg.solve, (_randn(2, 3, 3), _randn(2, 3)), REVERSE_FORWARD
    ),
    "solve from the right": Case(
        lambda A, B: torch.linalg.solve(A, B.T, left=False), (_A, _B), REVERSE_FORWARD
    ),
    "solve_ex": Case(lambda A, B: torch.linalg.solve_ex(A, B).result, (_A, _B), REVERSE_FORWARD),
    "tensorsolve": Case(torch.linalg.tensorsolve, (_randn(2, 3, 6), _randn(2, 3)), REVERSE_FORWARD),
    "tensorsolve with axes": Case(
        lambda A, B: torch.linalg.tensorsolve(A, B, dims=(0,)),
        (_randn(6, 2, 3), _randn(2, 3)),
        REVERSE_FORWARD,
    ),
    "householder_product": Case(
        torch.linalg.householder_product, (_randn(4, 3), _randn(3)), REVERSE_FORWARD
    ),
    "prod with a zero": Case(torch.prod, (_ZEROS,), REVERSE_FORWARD),
    "prod along an axis with zeros": Case(
        lambda x: x.reshape(2, 2).prod(1, keepdim=True), (_ZEROS,), REVERSE_FORWARD
    ),
    "cumprod with zeros": Case(lambda x: x.cumprod(0), (_ZEROS * _ZEROS.roll(1),), REVERSE_FORWARD),
    "logcumsumexp": Case(lambda x: torch.logcumsumexp(x, 0), (_A,), REVERSE),
    "logcumsumexp of -inf": Case(
        lambda x: torch.cat([_of(-INF), x, _of(-INF)]).logcumsumexp(0)[1:], (_ZEROS,), REVERSE
    ),
    "logcumsumexp over a wide range": Case(
        lambda x: torch.logcumsumexp(300 * x, 0) / 300, (_ZEROS,), REVERSE
    ),
    "cosine_embedding_loss": Case(
        lambda x, y: F.cosine_embedding_loss(x, y, _of(1, -1, 1)), (_A, _randn(3, 3))
    ),
    "attention with an idle row": Case(
        lambda q, k: F.scaled_dot_product_attention(q, k, q * k, attn_mask=_IDLE),
        (_Q, _randn(1, 3, 4)),
    ),
    "conv_transpose1d with output padding": Case(
        lambda x, w, b: F.conv_transpose1d(x, w, b, 3, 1, output_padding=2),
        (_randn(2, 2, 3), _randn(2, 3, 3), _randn(3)),
    ),
    "conv_transpose2d with output padding": Case(
        lambda x, w: F.conv_transpose2d(x, w, None, 2, (1, 0), (1, 0)),
        (_randn(2, 2, 3), _randn(2, 3, 3, 3)),
    ),
    "i1 at zero": Case(torch.special.i1, (_ZEROS,), REVERSE),
    "i0 next to zero": Case(torch.i0, (1e-5 * _randn(3),)),
    "sinc at zero": Case(torch.sinc, (_ZEROS / 3,), REVERSE),
}

FORWARD, NESTED = "forward that is differentiated by reverse", "forward that is differentiated"
REFUSED: dict[str, Case] = {
    "eigh": Case(
        lambda A: torch.linalg.eigh(_spd(A))[1].abs(),
        (_A,),
        REVERSE_FORWARD,
        FORWARD,
        "linalg.eigh",
    ),
    "eigvalsh": Case(
        lambda A: torch.linalg.eigvalsh(_spd(A)), (_A,), REVERSE_FORWARD, FORWARD, "linalg.eigh"
    ),
    "eigvals": Case(
        lambda A: torch.linalg.eigvals(_spd(A)).abs(), (_A,), REVERSE_FORWARD, NESTED, "linalg.eig"
    ),
    "pow of zero to a tensor": Case(
        lambda x: x ** _of(3, 2, 4, 3), (_ZEROS,), REVERSE_FORWARD, FORWARD, "pow of zero"
    ),
    "_safe_softmax": Case(
        lambda x: torch.ops.aten._safe_softmax(x, 0), (_randn(4, 2),), "", FORWARD, "_safe_softmax"
    ),
    "glu": Case(F.glu, (_ZEROS,), "", NESTED, "glu"),
    "det of a singular matrix": Case(
        torch.linalg.det,
        (_of(1, 2, 2, 4, 1, 3, 0, 1, 5).reshape(3, 3) * _of(1, 1, 0),),
        "",
        "all",
        "singular",
    ),
    "_native_batch_norm_legit": Case(
        lambda x: torch._native_batch_norm_legit(x, None, None, True, 0.1, 1e-5)[0],
        (_A,),
        REVERSE,
        "all",
        "_native_batch_norm_legit",
    ),
    "convolution with output_padding": Case(
        lambda x, w: torch.convolution(x, w, None, [2], [1], [1], True, [1], 1),
        (_randn(1, 2, 3), _randn(2, 1, 3)),
        "",
        "all",
        "output_padding",
    ),
    **{
        name: Case(f, (_A, _randn(3, 3)), "", "grad of jvp of grad", name)
        for name, f in {
            "norm": lambda x, y: (x + y).norm(),
            "cdist": torch.cdist,
            "pdist": lambda x, y: F.pdist(x + y),
            "std": lambda x, y: (x * y).std(0),
            "dist": torch.dist,
            "renorm": lambda x, y: torch.renorm(x * y, 2, 0, 0.5),
            "normalize": lambda x, y: F.normalize(x * y),
            "cosine_similarity": F.cosine_similarity,
            "pairwise_distance": F.pairwise_distance,
            "triplet_margin_loss": lambda x, y: F.triplet_margin_loss(x, y, x * y),
            "sgn": lambda x, y: torch.view_as_real(torch.complex(x, y).sgn()),
        }.items()
    },
}

_W, _W2, _T = _randn(8, 3), _randn(8, 2), torch.tensor([0, 2, 1])
COMMON: dict[str, Case] = {
    **{
        name: Case(getattr(F, name), (_A,))
        for name in ("gelu", "silu", "mish", "celu", "elu", "selu", "softplus", "logsigmoid")
    },
    "gelu tanh": Case(lambda x: F.gelu(x, approximate="tanh"), (_A,)),
    "linear": Case(lambda x, w: torch.tanh(F.linear(x, w)), (_A, _W)),
    "softmax": Case(lambda x: x.softmax(-1), (_A,)),
    "logsumexp": Case(lambda x: x.logsumexp(-1), (_A,)),
    "cross_entropy": Case(lambda x: F.cross_entropy(x, _T, label_smoothing=0.1), (_A,)),
    "mse_loss": Case(lambda x: F.mse_loss(x.sin(), torch.ones_like(x)), (_A,)),
    "conv2d": Case(
        lambda x, w: F.conv2d(x, w, stride=2, padding=1), (_randn(1, 2, 4, 4), _randn(2, 2, 3, 3))
    ),
    "conv_transpose2d": Case(
        lambda x, w: F.conv_transpose2d(x, w, stride=2), (_randn(1, 2, 2, 2), _randn(2, 1, 3, 3))
    ),
    "group_norm": Case(lambda x: F.group_norm(x[None], 1), (_A,)),
    "rms_norm": Case(lambda x, w: F.rms_norm(x, (3,), w), (_A, _of(1, 2, 3))),
    "attention": Case(
        lambda q, k: F.scaled_dot_product_attention(q, k, q * k, is_causal=True),
        (_Q, _randn(1, 3, 4)),
    ),
    "lstm_cell": Case(lambda x, w: torch.lstm_cell(x, (x[:, :2], x[:, 1:]), w, _W2)[0], (_A, _W)),
    "gru_cell": Case(lambda x, w: torch.gru_cell(x, x[:, :2], w, _W2[:6]), (_A, _randn(6, 3))),
    "embedding": Case(lambda w: F.embedding(torch.tensor([0, 1, 1]), w), (_A,)),
    "cholesky": Case(lambda A: torch.linalg.cholesky(_spd(A)), (_A,)),
    "inverse": Case(torch.linalg.inv, (_A,)),
    "svdvals": Case(torch.linalg.svdvals, (_A,)),
    "pinv": Case(torch.linalg.pinv, (_randn(4, 2),)),
    "matrix_exp": Case(torch.matrix_exp, (_A,)),
    "pow at zero": Case(lambda x: x**3, (_ZEROS,)),
    "xlogy at zero": Case(lambda x: torch.xlogy(_of(0, 1, 2, 3), x.exp()), (_ZEROS,)),
    "atan2 on the axes": Case(torch.atan2, (_ZEROS, _of(1, 0, 0, 2))),
    "logaddexp of equal numbers": Case(torch.logaddexp, (_ZEROS, _ZEROS.clone())),
    "lgamma": Case(torch.lgamma, (_of(0.5, 1, 3),)),
    "erfinv": Case(torch.erfinv, (_of(-0.5, 0, 0.7),)),
    "complex tanh": Case(lambda x, y: torch.complex(x, y).tanh().abs(), (_A, _randn(3, 3))),
    "a view": Case(lambda x: x.reshape(-1).as_strided((3, 3), (1, 1)) ** 2, (_A,)),
}


def _directions(problem: Problem) -> tuple[Any, Any]:
    return smooth_direction(problem, direction(problem, 6)), direction(problem, 5)


ALL = {**RULED, **REFUSED, **COMMON}


@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@pytest.mark.parametrize("name", ALL)
def test_every_composition_is_right_or_refuses_by_name(name: str) -> None:
    case = ALL[name]
    problem = case.problem(name)
    u, v = _directions(problem)
    truth = third_truth_of(problem, u, v)
    assert truth.value is not None, truth.why
    assert float(truth.value.norm()) > 1e-9, "a third derivative of zero proves nothing"
    found = {key: verdict(route, problem, truth, u, v) for key, route in ROUTES.items()}
    refusing = REFUSING[case.refused]
    assert {key for key, says in found.items() if says != "right"} == refusing, found
    assert all(case.named in found[key] for key in refusing), found


NO_RULE = {
    *("eig", "eigh", "eigvals", "eigvalsh", "_safe_softmax", "_native_batch_norm_legit"),
    *("det", "det in forward mode", "slogdet", "slogdet method", "renorm"),
    *("slogdet of complex matrices", "logdet of a batch", "solve", "solve for a vector"),
    *("solve for a batch of vectors", "solve from the right", "solve_ex", "tensorsolve"),
    *("tensorsolve with axes", "householder_product", "prod with a zero", "cumprod with zeros"),
    *("prod along an axis with zeros", "sgn", "i1 at zero", "i0 next to zero", "sinc at zero"),
    *("det of a singular matrix", "convolution with output_padding", "cholesky", "inverse"),
    *("svdvals", "pinv", "matrix_exp"),
}
"""Cases whose function has no rule of ours, so that a product by propagation is not differentiated."""


@pytest.mark.parametrize("name", ALL)
def test_a_product_by_propagation_is_differentiated_rightly_or_refused(name: str) -> None:
    problem = ALL[name].problem(name)
    u, v = _directions(problem)
    truth = third_truth_of(problem, u, v)
    found = {key: verdict(route, problem, truth, u, v) for key, route in PROPAGATED.items()}
    assert found["jvp of propagated hvp"].startswith("refused")
    if name in NO_RULE:
        assert found["grad of propagated hvp"].startswith("refused")
    else:
        assert found["grad of propagated hvp"] == "right"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name, case in ALL.items() if case.wrong])
def test_torch_alone_is_silently_wrong(name: str) -> None:
    case = ALL[name]
    problem = case.problem(name)
    u, v = _directions(problem)
    truth = third_truth_of(problem, u, v)
    assert truth.error(RAW[case.wrong](problem, u, v)) > 1e-3


def test_cosine_embedding_loss_is_silently_wrong_in_torch_as_a_forward_derivative() -> None:
    problem = RULED["cosine_embedding_loss"].problem("")
    u, v = _directions(problem)
    truth = third_truth_of(problem, u, v)
    params = optree.tree_map(Tensor.detach, problem.params)
    slope = grad(lambda p: jvp(problem.f, (p,), (u,))[1])
    assert truth.error(jvp(slope, (params,), (v,))[1]) > 1e-3


def test_attention_with_an_idle_row_is_nan_in_torch_by_reverse_over_forward() -> None:
    problem = RULED["attention with an idle row"].problem("")
    u, v = _directions(problem)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        raw = RAW[REVERSE_FORWARD](problem, u, v)
    assert flat(raw).isnan().any()


def test_a_complex_eigh_is_refused_under_transforms_and_right_by_plain_autograd() -> None:
    case = Case(
        lambda x, y: torch.linalg.eigvalsh(torch.complex(x, y) @ torch.complex(x, y).mH),
        (_A, _randn(3, 3)),
    )
    problem = case.problem("eigh")
    u, v = _directions(problem)
    truth = third_truth_of(problem, u, v)
    with pytest.raises(NoExactRouteError, match="complex matrix"):
        ROUTES["grad of hvp"](problem, u, v)
    assert truth.accepts(ROUTES["compat create_graph"](problem, u, v))


@pytest.mark.parametrize(
    "name", ["eigh", "eigvals", "pow of zero to a tensor", "glu", "norm", "std", "normalize"]
)
def test_the_second_derivative_of_what_is_refused_at_third_order_is_exact(name: str) -> None:
    problem = REFUSED[name].problem(name)
    params, v = optree.tree_map(Tensor.detach, problem.params), direction(problem, 5)
    exact = oracles.hvp(problem.f, params, v)
    oracles.assert_same(hvp(problem.f)(params, v), exact, 1e-9)
    oracles.assert_same(hessian_operator(problem.f, params) @ v, exact, 1e-9)


def test_what_does_not_depend_on_the_parameters_is_not_refused() -> None:
    scale = _of(1.0, 2.0)
    f = lambda p: (p * scale / scale.norm()).pow(4).sum()  # noqa: E731
    p = _of(0.5, -1.0)
    third = grad(lambda p: hvp(f, mode="forward_over_reverse")(p, p.detach()).sum())(p)
    c = (scale / scale.norm()) ** 4
    oracles.assert_same(third, 24 * c * p * p)


def test_every_refusal_is_in_the_table_with_its_reason() -> None:
    assert len(wrong_third.REFUSED) > 10
    assert all(len(reason) > 20 for reason in wrong_third.REFUSED.values())


# ------------------------------------------------------------------------------------- penalties

_P = {"w": _randn(3, 3), "b": _randn(3)}
_X = _randn(4, 3)


def _layer(f: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda p, x: f(x @ p["w"] + p["b"])


PENALISED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{
        name: _layer(getattr(F, name))
        for name in ("gelu", "silu", "mish", "elu", "softplus", "logsigmoid", "tanh", "softsign")
    },
    "matmul": lambda p, x: (x @ p["w"] + p["b"]) ** 3,
    "softmax": _layer(lambda z: z.softmax(-1) ** 2),
    "cross_entropy": _layer(lambda z: F.cross_entropy(z, torch.tensor([0, 2, 1, 1]))),
    "mse_loss": _layer(lambda z: F.mse_loss(z.sin(), torch.ones_like(z))),
    "layer_norm": _layer(lambda z: F.layer_norm(z, (3,), z[0]) ** 3),
    "batch_norm": _layer(lambda z: F.batch_norm(z, None, None, training=True) ** 3),
    "instance_norm": _layer(lambda z: F.instance_norm(z[None]) ** 3),
    "group_norm": _layer(lambda z: F.group_norm(z, 1) ** 3),
    "rms_norm": _layer(lambda z: F.rms_norm(z, (3,)) ** 3),
    "conv1d": lambda p, x: F.conv1d(x[:, None].sin(), p["w"][:, None, :2], p["b"]) ** 3,
    "attention": _layer(lambda z: F.scaled_dot_product_attention(z[None], z[None], z[None]) ** 2),
    "lstm_cell": lambda p, x: torch.lstm_cell(
        x @ p["w"], (x[:, :2], x[:, 1:]), _W, _W2, torch.cat([p["b"], p["b"], p["b"][:2]])
    )[0],
    "det": lambda p, x: torch.linalg.det(p["w"] + x[:3]),
    "solve": lambda p, x: torch.linalg.solve(p["w"] + x[:3], p["b"]),
    "logcumsumexp": _layer(lambda z: torch.logcumsumexp(z, 1)),
    "prod": _layer(lambda z: z.prod(1)),
    "norm": _layer(lambda z: z.norm(dim=1)),
    "weight_norm": lambda p, x: torch.tanh(
        x @ torch._weight_norm(p["w"] * x[:3], p["b"][:, None], 0)
    ),
}


def _weight_norm_written_out(p: Any, x: Tensor) -> Tensor:
    rows = p["w"] * x[:3]
    return torch.tanh(x @ (p["b"][:, None] * rows / rows.square().sum(1, keepdim=True).sqrt()))


def _penalty(inner: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    def loss(p: Any) -> Tensor:
        x = _X + 0 * p["b"]  # of the graph: inside a transform nothing new can require gradients
        (slope,) = torch.autograd.grad(inner(p, x).sum(), x, create_graph=True)
        return (slope**2).sum()

    return loss


def _functional_penalty(inner: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda p: (grad(lambda x: inner(p, x).sum())(_X) ** 2).sum()


def _difference_of_gradients(f: Callable[[Any], Tensor], v: Any) -> Any:
    """Return the product by a central difference of fourth order: gradients are second derivatives of the function."""
    step = 1e-3
    ends = {
        k: oracles.real_flat(oracles.gradient(f, oracles.shifted(_P, k * step, v)))
        for k in (-2, -1, 1, 2)
    }
    return oracles.like((8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * step), _P)


@pytest.mark.parametrize("name", PENALISED)
def test_the_curvature_of_a_gradient_penalty_is_right(name: str) -> None:
    inner, v = PENALISED[name], oracles.random_like(_P, 1)
    penalty = _penalty(inner)
    # The second derivative of weight_norm by plain autograd is wrong.
    plain = _penalty(_weight_norm_written_out) if name == "weight_norm" else penalty
    expected = _difference_of_gradients(plain, v)
    leaves, spec = optree.tree_flatten(optree.tree_map(lambda p: p.clone().requires_grad_(), _P))
    closure = lambda: penalty(spec.unflatten(leaves))  # noqa: E731
    found = {
        "hvp": hvp(penalty)(_P, v),
        "hvp of a functional gradient": hvp(_functional_penalty(inner))(_P, v),
        "operator": hessian_operator(penalty, _P) @ v,
        "compat": spec.unflatten(exact_hvp(closure, leaves, optree.tree_leaves(v))),
    }
    errors = {key: oracles.relative_error(answer, expected) for key, answer in found.items()}
    assert max(errors.values()) < 1e-6, errors


# ------------------------------------------------------------------------------------- everything

GROUPS = 12
UNDECIDED = {
    "__rpow__": "a negative number to a real power",
    "corrcoef": "of two numbers is constant",
    "logcumsumexp": "of numbers near 1e4, whose differences are rounded",
    "linalg.norm.subgradients_at_zero": "a kink",
    "nn.KLDivLoss": "the logarithm of a negative target",
    "nn.LPPool1d": "a root of a negative number",
    "nn.LPPool2d": "a root of a negative number",
    "nn.LPPool3d": "a root of a negative number",
    "nn.functional.max_unpool1d": "refused at second order",
    "nn.functional.max_unpool2d": "refused at second order",
    "nn.functional.max_unpool3d": "refused at second order",
    "sparse.sampled_addmm": "refused at second order",
}
"""Subjects some cases of which have no third derivative to compare with, and why."""
EVERYWHERE = {"_native_batch_norm_legit", "_batch_norm_with_update", "to_sparse"}
"""Operators that no composition differentiates three times; every other one is right by reverse mode."""
BY_REVERSE = ("grad of hvp", "autograd of hvp", "compat create_graph", "hvp of autograd")


@cache
def _everything() -> dict[str, list[Problem]]:
    """Return the problems by subject: all cases of a module, evenly spaced ones where it has hundreds."""
    subjects: dict[str, list[Problem]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for problem in [*module_problems(), *operator_problems(2)]:
            leaves = optree.tree_leaves(problem.params)
            if leaves and all(leaf.layout == torch.strided for leaf in leaves):
                subjects.setdefault(problem.subject, []).append(problem)
    return {name: cases[:: math.ceil(len(cases) / 80)] for name, cases in subjects.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", range(GROUPS))
def test_every_module_and_operator_is_right_or_refused(group: int) -> None:
    bad: list[str] = []
    decided = 0
    for subject in sorted(_everything())[group::GROUPS]:
        for problem in _everything()[subject]:
            u, v = _directions(problem)
            truth = third_truth_of(problem, u, v)
            if truth.value is None:
                if subject not in UNDECIDED:
                    bad.append(f"{problem.name}: no truth, {truth.why}")
                continue
            decided += 1
            for key, route in {**ROUTES, **PROPAGATED}.items():
                says = verdict(route, problem, truth, u, v)
                refused = says.startswith("refused") and (
                    subject in EVERYWHERE or key not in BY_REVERSE
                )
                if says != "right" and not refused:
                    bad.append(f"{problem.name}, {key}: {says}")
    assert decided > 20
    assert not bad, "\n".join(bad)
