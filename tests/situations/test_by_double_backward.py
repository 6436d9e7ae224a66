"""Losses that `torch.func` refuses and double backward does not, through the transform and the operator.

Checkpointed segments, derivatives in leaves of the loss's own, and backward hooks of modules. Closures of the same
losses are in the files of their subjects.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import CurvatureFallbackWarning, functional_loss, hessian_operator
from tests.situations.entries import ENTRIES, Case, assert_product, classification, mlp
from tests.situations.test_checkpointing import OPTIONS
from tests.situations.test_checkpointing import _case as _checkpointed
from tests.situations.test_gradient_penalty import KINDS, _assert_exact, _case, _slope

pytestmark = pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
AUTO = pytest.mark.parametrize("entry", ["hvp", "operator", "operator.mm"])


@pytest.mark.parametrize("options", OPTIONS)
@AUTO
def test_checkpointing_in_functional_loss(entry: str, options: str) -> None:
    assert_product(entry, _checkpointed(**OPTIONS[options]), seed=7)


@AUTO
def test_checkpointing_leaves_the_random_state_of_one_evaluation(entry: str) -> None:
    case = _checkpointed(dropout=0.4)
    v = case.vector()
    torch.manual_seed(5)
    case.closure()
    once = torch.get_rng_state()
    torch.manual_seed(5)
    ENTRIES[entry](case, v)
    assert torch.equal(torch.get_rng_state(), once)


def test_checkpointed_operators_have_one_mask() -> None:
    case = _checkpointed(dropout=0.4)
    f, params = functional_loss(case.model, case.loss_fn)
    op = hessian_operator(f, params, case.x, case.y)
    v = dict(zip(params, case.vector(), strict=True))
    first = op @ v
    torch.manual_seed(99)
    second = op @ v
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(bool(h.any()) for h in first.values())


@pytest.mark.parametrize("kind", [*KINDS, "batch norm"])
@AUTO
def test_a_penalty_by_autograd_in_a_leaf_of_its_own(entry: str, kind: str) -> None:
    _assert_exact(entry, _case(kind, _slope, _slope))


@pytest.mark.parametrize("kind", KINDS)
@AUTO
def test_a_penalty_in_inputs_that_require_gradients(entry: str, kind: str) -> None:
    def in_the_input(network: Any, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        return slope

    case = _case(kind, in_the_input, _slope)
    case.x.requires_grad_()
    _assert_exact(entry, case)


@AUTO
def test_backward_hooks_of_modules(entry: str) -> None:
    model = mlp()
    model[2].register_full_backward_hook(lambda module, inputs, outputs: None)
    model[1].register_full_backward_pre_hook(lambda module, outputs: None)
    assert_product(entry, Case(model, F.cross_entropy, *classification()))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@AUTO
def test_gradient_checkpointing_of_transformers(entry: str, name: str, dropout: float) -> None:
    hf = pytest.importorskip("tests.situations.test_transformers")
    case = hf._case(name, dropout=dropout)
    case.model.inner.config.use_cache = False
    hf._checkpoint(case.model.inner)
    hf._assert_product(entry, case, 1e-6, seed=5)


@AUTO
def test_the_fallback_is_admitted(entry: str) -> None:
    case = _checkpointed()
    with pytest.warns(CurvatureFallbackWarning, match="double_backward"):
        ENTRIES[entry](case, case.vector())
