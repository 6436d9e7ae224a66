"""Half precision, mixed dtypes and complex parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import hessian_operator, hvp
from secorder_func.compat.core.hvp import exact_hvp
from tests import oracles
from tests.situations.entries import ENTRIES, Case, double_backward, every_entry

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _network(kind: str) -> Case:
    torch.manual_seed(0)
    norm = {"plain": nn.Identity(), "norms": nn.LayerNorm(8), "groups": nn.GroupNorm(2, 8)}[kind]
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, 3))
    return Case(model, F.cross_entropy, torch.randn(9, 4), torch.arange(9) % 3)


def _cast(case: Case, dtype: torch.dtype, *, norms: torch.dtype | None = None) -> Case:
    model = case.model.to(dtype)
    model[1].to(norms or dtype)
    return Case(model, case.loss_fn, case.x.to(dtype), case.y)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["plain", "norms", "groups"])
@every_entry
def test_a_half_precision_network_is_as_near_to_float64_as_plain_autograd(
    entry: str, kind: str, dtype: torch.dtype
) -> None:
    case = _cast(_network(kind), dtype)
    v = case.vector()
    plain = double_backward(case, v)
    rounded = {name: t.double() for name, t in case.model.state_dict().items()}
    exact = _cast(_network(kind), torch.float64)
    exact.model.load_state_dict(rounded)
    exact = Case(exact.model, case.loss_fn, case.x.double(), case.y)
    truth = double_backward(exact, [t.double() for t in v])
    product = ENTRIES[entry](case, v)
    assert all(h.dtype == dtype for h in product)
    allowed = 16 * ROUNDING[dtype]
    assert oracles.relative_error(plain, truth) < allowed
    assert oracles.relative_error(product, truth) < allowed


@pytest.mark.parametrize("kind", ["norms", "groups"])
@every_entry
def test_norms_in_float32_in_a_bfloat16_network(entry: str, kind: str) -> None:
    case = _cast(_network(kind), torch.bfloat16, norms=torch.float32)
    v = case.vector()
    exact = _cast(_network(kind), torch.float64)
    exact.model.load_state_dict({k: t.double() for k, t in case.model.state_dict().items()})
    exact = Case(exact.model, case.loss_fn, case.x.double(), case.y)
    truth = double_backward(exact, [t.double() for t in v])
    product = ENTRIES[entry](case, v)
    assert [h.dtype for h in product] == [p.dtype for p in case.params]
    assert oracles.relative_error(product, truth) < 16 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("norm", ["layer", "group", "batch", "instance"])
def test_third_derivatives_keep_the_dtype_of_a_half_precision_input(norm: str) -> None:
    weight, bias = torch.rand(4) + 0.5, torch.randn(4)
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "layer": lambda h: F.layer_norm(h.mT, (4,), weight, bias),
        "group": lambda h: F.group_norm(h, 2, weight, bias),
        "batch": lambda h: F.batch_norm(h, None, None, weight, bias, True),
        "instance": lambda h: F.instance_norm(h, None, None, weight, bias),
    }
    p = torch.randn(3, 4, 5).bfloat16()
    dtypes = []

    def f(p: Tensor) -> Tensor:
        h = norms[norm](p**2)
        dtypes.append(h.dtype)
        return (h**3).sum()

    torch.func.grad(lambda p: (hvp(f)(p, p) ** 2).sum())(p)
    assert set(dtypes) == {torch.bfloat16}


class MixedDtypes(nn.Module):
    """A float32 layer, a float64 layer and a half-precision scale in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3).double()
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5, 0.75]).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).double()) * self.scale.double()


@every_entry
def test_every_parameter_keeps_its_dtype_in_a_mixed_model(entry: str) -> None:
    torch.manual_seed(0)
    case = Case(MixedDtypes(), F.cross_entropy, torch.randn(9, 4), torch.arange(9) % 3)
    v = case.vector()
    product, expected = ENTRIES[entry](case, v), double_backward(case, v)
    oracles.assert_same(product, expected, rtol=2**-8)  # of the bfloat16 block
    single = [(a, b) for a, b in zip(product, expected, strict=True) if a.dtype != torch.bfloat16]
    oracles.assert_same([a for a, _ in single], [b for _, b in single], rtol=1e-6)


# ------------------------------------------------------------------------------------------ complex


def _quartic(z: Tensor) -> Tensor:
    return (z.abs() ** 4).sum()


def _closure(z: Tensor, v: Tensor, **options: Any) -> Tensor:
    leaf = z.clone().requires_grad_()
    return exact_hvp(lambda: _quartic(leaf), [leaf], v, **options).detach()


COMPLEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hvp": lambda z, v: hvp(_quartic)(z, v),
    "hvp in reverse": lambda z, v: hvp(_quartic, mode="reverse_over_reverse")(z, v),
    "operator": lambda z, v: hessian_operator(_quartic, z) @ v,
    "operator.mm": lambda z, v: hessian_operator(_quartic, z).mm(torch.stack([1j * v, v]))[1],
    "exact_hvp": _closure,
    "exact_hvp with a graph": lambda z, v: _closure(z, v, create_graph=True),
}


@pytest.mark.parametrize("entry", COMPLEX)
def test_a_complex_quartic_has_its_product_by_formula(entry: str) -> None:
    # |z|^4 as a function of two reals: gradient 4 |z|² z, whose derivative along v is 4 (2 |z|² v + z² conj(v)).
    z, v = torch.randn(5, dtype=torch.complex128), torch.randn(5, dtype=torch.complex128)
    expected = 4 * (2 * z.abs() ** 2 * v + z**2 * v.conj())
    oracles.assert_same(COMPLEX[entry](z, v), expected)


class ComplexLayer(nn.Module):
    """A complex linear layer between real ones, as in spectral models."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4, dtype=torch.complex128)
        self.outer = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = self.inner(torch.fft.rfft(x))
        return self.outer(spectrum.abs().square())


@every_entry
def test_a_model_with_real_and_complex_parameters_is_exact(entry: str) -> None:
    torch.manual_seed(0)
    case = Case(ComplexLayer(), F.mse_loss, torch.randn(6, 4).double(), torch.randn(6, 2).double())
    v = case.vector()
    oracles.assert_same(ENTRIES[entry](case, v), double_backward(case, v))
