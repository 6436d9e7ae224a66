"""Diagonal blocks of operators and tables of layers, against the blocks of the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder_func import (
    LinearOperator,
    eigsh,
    exact_diagonal,
    exact_trace,
    functional_loss,
    functional_model,
    ggn_operator,
    hessian_operator,
    hutchinson_trace,
    layer_curvature,
    tree,
)
from tests import oracles, problems
from tests.algorithms.matrices import LIKE, generator, operator, random_matrix


def small() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 4).double(), torch.randint(3, (7,))


def indices(params: Any, wanted: Any) -> Tensor:
    """Return the entries of the leaves whose names are wanted, in the order of names."""
    places, offset = {}, 0
    for name, leaf in zip(tree.names(params), oracles.leaves_of(params), strict=True):
        places[name] = torch.arange(offset, offset + leaf.numel())
        offset += leaf.numel()
    return torch.cat([places[name] for name in sorted(places) if wanted(name)])


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("selection", ["0", "2.weight", ("0.bias", "2"), lambda n: "weight" in n])
def test_blocks_are_those_of_the_matrix(selection: Any, kind: str) -> None:
    model, x, y = small()
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    model_fn, _ = functional_model(model)
    if kind == "hessian":
        op, matrix = hessian_operator(f, params, x, y), oracles.hessian(f, params, x, y)
    else:
        loss = nn.CrossEntropyLoss()
        op = ggn_operator(model_fn, loss, params, x, y)
        matrix = oracles.ggn(model_fn, loss, params, x, y)
    if callable(selection):
        wanted = selection
    else:
        prefixes = (selection,) if isinstance(selection, str) else selection
        wanted = lambda n: any(n == p or n.startswith(p + ".") for p in prefixes)  # noqa: E731
    rows = indices(params, wanted)
    expected = matrix[rows][:, rows]
    block = op.block(selection)
    assert list(block.like) == sorted(name for name in params if wanted(name))
    oracles.assert_same(block.dense(), expected, 1e-10)
    v = oracles.random_like(block.like, 1)
    oracles.assert_same(oracles.flat(block @ v), expected @ oracles.flat(v), 1e-10)
    oracles.assert_same(exact_trace(block), expected.trace(), 1e-10)
    oracles.assert_same(oracles.flat(exact_diagonal(block)), expected.diag(), 1e-10)
    forms = block.quadratic_forms(tree.stack([v]))
    oracles.assert_same(forms, (oracles.flat(v) @ expected @ oracles.flat(v)).reshape(1), 1e-10)
    estimate = hutchinson_trace(block, 64, generator=generator(0))
    assert estimate.by_propagation
    assert abs(float(estimate.value - expected.trace())) < 5 * float(estimate.standard_error)
    found = eigsh(block, 1, which="LM").eigenvalues
    values = torch.linalg.eigvalsh(expected)
    oracles.assert_same(found.abs(), values.abs().max().reshape(1), 1e-8)


def test_a_block_keeps_the_dropout_mask_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    op = hessian_operator(f, params, torch.randn(7, 4).double(), torch.randint(3, (7,)))
    whole = op.dense()
    rows = indices(params, lambda name: name.startswith("0"))
    torch.manual_seed(77)
    oracles.assert_same(op.block("0").dense(), whole[rows][:, rows], 1e-10)
    oracles.assert_same(exact_trace(op.block("0")), whole[rows][:, rows].trace(), 1e-10)


def test_trees_of_any_shape_have_names() -> None:
    p = problems.load("nested_tree")
    op = hessian_operator(p.f, p.params, *p.args)
    H = oracles.hessian(p.f, p.params, *p.args)
    for name in tree.names(p.params):
        rows = indices(p.params, lambda n, name=name: n == name)
        if len(rows) and H[rows][:, rows].any():
            oracles.assert_same(op.block(name).dense(), H[rows][:, rows], 1e-10)
    root = LinearOperator(lambda v: 3 * v, torch.zeros(2))
    assert root.block(lambda name: True).dense().diag().tolist() == [3.0, 3.0]


def test_blocks_of_known_matrices_with_odd_leaves() -> None:
    matrix = random_matrix(3)
    rows = indices(LIKE, lambda name: name.startswith("b") or name == "w")
    block = operator(matrix).block(["b", "w"])
    oracles.assert_same(block.dense(), matrix[rows][:, rows], 1e-12)
    vectors = tree.stack([oracles.random_like(block.like, s) for s in range(3)])
    flat = torch.cat([leaf.reshape(3, -1) for leaf in oracles.leaves_of(vectors)], 1)
    found = torch.cat([leaf.reshape(3, -1) for leaf in oracles.leaves_of(block.mm(vectors))], 1)
    oracles.assert_same(found, flat @ matrix[rows][:, rows], 1e-12)


@pytest.mark.parametrize("groups", [None, {"all but a bias": ["0.weight", "2"]}])
def test_the_block_diagonal_operator(groups: Any) -> None:
    model, x, y = small()
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    matrix = oracles.hessian(f, params, x, y)
    keep = torch.zeros_like(matrix)
    chosen = [lambda n: n.startswith("0"), lambda n: n.startswith("2")]
    if groups is not None:
        chosen = [lambda n: n != "0.bias"]
    for wanted in chosen:
        rows = indices(params, wanted)
        keep[rows.unsqueeze(1), rows] = 1
    op = hessian_operator(f, params, x, y).block_diagonal(groups)
    assert op.symmetric
    oracles.assert_same(op.dense(), matrix * keep, 1e-10)
    v = oracles.random_like(params, 3)
    oracles.assert_same(oracles.flat(op @ v), (matrix * keep) @ oracles.flat(v), 1e-10)


def test_the_table_of_layers() -> None:
    model, x, y = small()
    f, params = functional_loss(model, nn.CrossEntropyLoss())
    matrix = oracles.hessian(f, params, x, y)
    blocks = [
        matrix[rows][:, rows]
        for rows in (indices(params, lambda n, c=c: n.startswith(c)) for c in "02")
    ]
    op = hessian_operator(f, params, x, y)
    table = layer_curvature(op, 400, generator=generator(0))
    assert table.names == ("0", "2")
    assert table.num_parameters == (25, 18)
    truth = torch.stack([block.trace() for block in blocks])
    errors = table.traces.standard_error
    assert ((table.traces.value - truth).abs() < 5 * errors).all()
    assert (errors < 0.1 * truth.abs().max()).all()
    for value, block in zip(table.eigenvalues, blocks, strict=True):
        values = torch.linalg.eigvalsh(block)
        assert float(value.abs()) == pytest.approx(float(values.abs().max()), rel=1e-8)
    lines = str(table).splitlines()
    assert lines[0].split() == [
        "group",
        "parameters",
        "trace",
        "±",
        "mean",
        "diagonal",
        "eigenvalue",
    ]
    assert [line.split()[:2] for line in lines[1:]] == [["0", "25"], ["2", "18"]]
    without = layer_curvature(op, 8, which=None, groups={"weights": lambda n: "weight" in n})
    assert without.eigenvalues is None
    assert without.names == ("weights",)


def test_bad_selections() -> None:
    op = operator(random_matrix())
    with pytest.raises(
        ValueError, match=r"^LinearOperator.block: no leaf has the name 'c', .*: a, b\.0"
    ):
        op.block("c")
    with pytest.raises(ValueError, match="the predicate says yes to no leaf"):
        op.block(lambda name: False)
    with pytest.raises(ValueError, match="the selection is empty"):
        op.block([])
    with pytest.raises(ValueError, match="leaf 'a' is in two groups, 'one' and 'two'"):
        op.block_diagonal({"one": "a", "two": ["a", "w"]})
    with pytest.raises(TypeError, match="groups must be a dict of selections by name, got list"):
        op.block_diagonal(["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the first argument must be a LinearOperator"):
        layer_curvature(3, 4)  # type: ignore[arg-type]
    same = {"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}
    with pytest.raises(ValueError, match=r"two leaves have the name 'a\.b'"):
        LinearOperator(lambda v: v, same).block("a")


def test_scalars_and_empty_leaves_beside_a_block() -> None:
    like = {
        "s": torch.zeros(()).double(),
        "w": torch.zeros(2).double(),
        "e": torch.zeros(0).double(),
    }
    op = LinearOperator(lambda v: {"s": 2 * v["s"], "w": 3 * v["w"], "e": v["e"]}, like)
    assert op.block("w").dense().diag().tolist() == [3.0, 3.0]
    assert op.block_diagonal().dense().diag().tolist() == [2.0, 3.0, 3.0]
    table = layer_curvature(op, 4)
    assert dict(zip(table.names, table.traces.value.tolist(), strict=True)) == {"s": 2.0, "w": 6.0}
    assert table.eigenvalues.tolist() == pytest.approx([2.0, 3.0])
    assert table.converged
    root = layer_curvature(LinearOperator(lambda v: 3 * v, torch.zeros(4)), 4)
    assert root.names == ("all",)


def test_sums_of_half_precision_are_wide() -> None:
    like = {"w": torch.zeros(70_000, dtype=torch.float16)}
    table = layer_curvature(LinearOperator(lambda v: {"w": 3 * v["w"]}, like), 2, which=None)
    assert float(table.traces.value) == pytest.approx(210_000)


def test_bad_tables() -> None:
    op = operator(random_matrix())
    with pytest.raises(ValueError, match="groups is empty"):
        layer_curvature(op, 4, groups={})
    with pytest.raises(ValueError, match="which must be one of 'LA', 'SA', 'LM' or None, got 'XX'"):
        layer_curvature(op, 4, which="XX")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="a selection is a name, names or a function of a name, got int"
    ):
        op.block(1)  # type: ignore[arg-type]
    same = {"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}
    with pytest.raises(ValueError, match="two leaves have the name"):
        layer_curvature(LinearOperator(lambda v: v, same), 4, which=None)
