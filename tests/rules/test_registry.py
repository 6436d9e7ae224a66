"""The table of repairs itself."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secorder_func import hvp
from secorder_func.rules import REPAIRS, repairs
from tests import oracles
from tests.versions import needs_traceable_trees


def test_every_repair_states_its_evidence() -> None:
    assert all(len(repair.because) > 20 for repair in REPAIRS.values())


def test_every_repair_has_a_callable_in_its_place() -> None:
    assert len(REPAIRS) > 10
    assert all(callable(repair.apply) for repair in REPAIRS.values())


def test_no_repair_stands_under_a_name_that_dynamo_cannot_look_up() -> None:
    untraced = {"backward", "register_hook"}  # no compiled loss calls them
    methods = {n: f for n, f in vars(Tensor).items() if isinstance(f, FunctionType)}
    assert not {n for n, f in methods.items() if f in REPAIRS} - untraced


@needs_traceable_trees
@pytest.mark.parametrize(
    "f", [lambda p: p.norm() ** 3, lambda p: torch.norm(p) ** 3, lambda p: (p**4).prod()]
)
def test_what_is_refused_at_third_order_compiles_at_second(f: Any) -> None:
    p, v = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 1.0]).double()
    torch._dynamo.reset()
    compiled = torch.compile(hvp(f), fullgraph=True, backend="aot_eager")
    oracles.assert_same(compiled(p, v), oracles.hvp(f, p, v))


def test_a_second_repair_of_one_function_is_refused() -> None:
    with pytest.raises(ValueError, match="two repairs for"):

        @repairs(F.mse_loss, because="a second reason for the same function")
        def _other(rules: Any, *args: Any) -> None: ...


def test_the_rules_are_off_again_after_a_product() -> None:
    hvp(lambda p: (p**3).sum())(torch.ones(2), torch.ones(2))
    assert torch._C._len_torch_function_stack() == 0


def test_the_rules_are_off_again_after_an_error() -> None:
    def f(p: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        hvp(f)(torch.ones(2), torch.ones(2))
    assert torch._C._len_torch_function_stack() == 0
