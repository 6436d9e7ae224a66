"""Every module and operator of torch's databases: right through every entry point, in every mode, or refused.

The truth of each product is in `reference.py`. `make test` takes a sample of the cases, `make test-full` all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import optree
import pytest
import torch

from secorder_func.errors import NoExactRouteError
from tests.coverage.entry_points import (
    ENTRY_POINTS,
    Verdict,
    by_mode,
    judge,
    mapped_by_mode,
)
from tests.coverage.further import (
    FUNCTIONS,
    MODULES,
    NO_FUNCTION,
    further_problems,
    public_functions,
    public_modules,
)
from tests.coverage.problems import Problem, module_problems, operator_problems
from tests.versions import BEFORE_2_10

# torch's databases warn as they are built, of their own deprecated and beta functions.
pytestmark = pytest.mark.filterwarnings("ignore")

MODES = (
    "reverse_over_forward",
    "forward_over_reverse",
    "reverse_over_reverse",
    "double_backward",
)
PROPAGATED_AND_MAPPED = "propagated and mapped"
WAYS = {
    **ENTRY_POINTS,
    **{mode: by_mode(mode) for mode in MODES},
    PROPAGATED_AND_MAPPED: mapped_by_mode("reverse_over_forward"),
}

UNDEFINED = {
    "linalg.norm.subgradients_at_zero": "a norm has no second derivative at zero",
}
"""Operators whose cases have no second derivative, and why."""

REFUSED = {
    "sparse.sampled_addmm": "torch differentiates it once",
    "nn.functional.max_unpool1d": "with repeated indices torch's gradient is not that of the output",
    "nn.functional.max_unpool2d": "with repeated indices torch's gradient is not that of the output",
    "nn.functional.max_unpool3d": "with repeated indices torch's gradient is not that of the output",
}
"""Operators without an exact second derivative in torch; the limit is twelve."""

if BEFORE_2_10:
    REFUSED.update(
        dict.fromkeys(
            ("grid_sampler_2d", "grid_sampler_3d", "nn.functional.grid_sample"),
            "torch differentiates it once before 2.10",
        )
    )

NOT_FORWARD = {
    "cholesky": "no forward rule",
    "cholesky_inverse": "a wrong forward rule",
    "cholesky_solve": "a wrong forward rule",
    "triangular_solve": "a wrong forward rule",
    "scatter_reduce.prod": "a wrong forward rule",
    "ormqr": "no forward rule",
    "index_reduce.amax": "no forward rule",
    "index_reduce.amin": "no forward rule",
    "index_reduce.mean": "no forward rule",
    "index_reduce.prod": "no forward rule",
    "native_dropout_backward": "no forward rule",
    "nn.functional.conv_tbc": "no forward rule",
    "nn.functional.grid_sample": "no forward rule",
    "grid_sampler_2d": "no forward rule",
    "grid_sampler_3d": "no forward rule",
    "normal": "no forward rule",
    "to_sparse": "no forward rule",
}
"""Operators that `mode="forward_over_reverse"` refuses."""

NOT_MAPPED = {
    "nn.functional.rrelu": "random slopes have no rule for vmap",
    "nn.RReLU": "random slopes have no rule for vmap",
    "to_sparse": "sparse tensors have no rule for vmap",
}
"""Operators of which `vmap` over the vectors has no rule; an operator's `mm` serves."""


NOT_PROPAGATED = {
    **dict.fromkeys(
        (
            "_batch_norm_with_update",
            "_native_batch_norm_legit",
            "_softmax_backward_data",
            "_unsafe_masked_index",
            "_unsafe_masked_index_put_accumulate",
            "_upsample_bilinear2d_aa",
            "cartesian_prod",
            "cholesky",
            "cholesky_inverse",
            "cholesky_solve",
            "grid_sampler_2d",
            "grid_sampler_3d",
            "index_reduce.amax",
            "index_reduce.amin",
            "index_reduce.mean",
            "index_reduce.prod",
            "linalg.eig",
            "linalg.eigh",
            "linalg.eigvals",
            "linalg.eigvalsh",
            "max_pool2d_with_indices_backward",
            "native_dropout_backward",
            "nn.functional.grid_sample",
            "ormqr",
            "slice",
            "to_sparse",
            "torch.ops.aten._safe_softmax.default",
            "triangular_solve",
        ),
        "no rule, and none of torch that was proved right",
    ),
    "normal": "torch has no forward rule for these arguments",
    "scatter_reduce.prod": "a wrong forward rule",
}
"""Operators that `mode="reverse_over_forward"` refuses, perhaps for some arguments only."""

NOT_PROPAGATED_AND_MAPPED = {
    **dict.fromkeys(
        ("to", "bfloat16", "cdouble", "cfloat", "chalf", "double", "float", "half"),
        "memory formats count dimensions, of which vmap adds one",
    ),
    "as_strided.partial_views": "reads memory that does not belong to its argument",
}
"""Operators that it refuses under `vmap`."""


def check(problems: Iterable[Problem]) -> int:
    """Judge every problem; return how many there were."""
    count, complaints = 0, []
    for problem in problems:
        leaves = optree.tree_leaves(problem.params)
        dense = all(leaf.layout == torch.strided for leaf in leaves)
        if not leaves or not dense or problem.subject in UNDEFINED:
            continue
        count += 1
        truth, verdicts = judge(problem, WAYS)
        assert truth.value is not None, f"{problem.name}: no truth: {truth.why}"
        complaints += [
            f"{problem.name} by {way}: {verdict.error or 'a wrong answer'}"
            for way, verdict in verdicts.items()
            if not _as_expected(problem.subject, way, verdict)
        ]
    assert not complaints, "\n".join(complaints)
    return count


def _as_expected(subject: str, way: str, verdict: Verdict) -> bool:
    if verdict.right is not None:
        return verdict.right
    if subject in REFUSED:
        return isinstance(verdict.error, (NoExactRouteError, RuntimeError))
    if way == "reverse_over_forward":
        return subject in NOT_PROPAGATED and isinstance(verdict.error, NoExactRouteError)
    if way == PROPAGATED_AND_MAPPED:
        return subject in {*NOT_PROPAGATED, *NOT_MAPPED, *NOT_PROPAGATED_AND_MAPPED}
    if way == "forward_over_reverse":
        return subject in NOT_FORWARD and isinstance(verdict.error, NoExactRouteError)
    return way == "mapped" and subject in NOT_MAPPED


def _thinned(problems: Iterable[Problem], step: int) -> Iterable[Problem]:
    return (problem for index, problem in enumerate(problems) if index % step == 0)


def test_a_sample_of_the_module_database_is_right_in_every_way() -> None:
    assert check(_thinned(module_problems(), 23)) > 50


def test_one_case_of_every_fourth_operator_is_right_in_every_way_or_refused() -> None:
    assert check(_thinned(operator_problems(1), 4)) > 120


def test_what_the_databases_leave_out_of_torch_nn_is_right_in_every_way() -> None:
    assert check(further_problems()) > 120


@pytest.mark.slow
def test_the_whole_module_database_is_right_in_every_way() -> None:
    assert check(module_problems()) > 1800


@pytest.mark.slow
def test_the_whole_operator_database_is_right_in_every_way_or_refused() -> None:
    assert check(operator_problems(20)) > 4000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_at_other_values_every_operator_is_right_in_every_way_or_refused(seed: int) -> None:
    assert check(operator_problems(2, seed)) > 900


def test_at_most_twelve_operators_are_refused() -> None:
    assert len(REFUSED) <= 12


def test_no_module_of_torch_nn_is_forgotten() -> None:
    modules = pytest.importorskip("torch.testing._internal.common_modules")
    known = {info.module_cls.__name__ for info in modules.module_db} | {*MODULES, *NO_FUNCTION}
    assert public_modules() - known == set()


def test_no_function_of_torch_nn_functional_is_forgotten() -> None:
    operators = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    known = {info.name.split(".")[-1] for info in operators.op_db}
    known |= {info.aten_name for info in operators.op_db} | {*FUNCTIONS, *NO_FUNCTION}
    assert public_functions() - known == set()
