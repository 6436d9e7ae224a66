"""The vector space of pytrees, and the only place that knows how a pytree is taken apart.

torch's own pytree keeps the insertion order of dict keys and counts `None` as a leaf; optree sorts
keys and counts `None` as an empty subtree. The library takes trees apart with optree alone and hands
torch's transforms flat tuples of tensors, about which both agree. Two dicts with the same keys in
another order are therefore the same tree, and results come back in the order of the first argument.

The inner product is real: for complex leaves it is the real part of `sum(conj(x) * y)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secorder_func.typing import Tree

__all__ = [
    "add",
    "axpy",
    "basis",
    "batched_dot",
    "common_dtype",
    "dot",
    "flatten",
    "flatten_fully",
    "map",
    "names",
    "norm",
    "numel",
    "paths",
    "random_like",
    "ravel",
    "scale",
    "stack",
    "structure",
    "sub",
    "tensors_and_rest",
    "tensors_in",
    "unstack",
    "zeros_like",
]

Unflatten = Callable[[Sequence[Any]], Tree]


def flatten(tree: Tree, /) -> tuple[list[Any], Unflatten]:
    """Return the leaves of a tree, dict keys sorted, and the function that puts leaves back.

    >>> leaves, unflatten = flatten({"b": 2, "a": (1, None)})
    >>> leaves
    [1, 2]
    >>> unflatten([10, 20])
    {'b': 20, 'a': (10, None)}
    """
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec.unflatten


def flatten_fully(tree: Any, /) -> tuple[list[Any], Unflatten]:
    """Do as `flatten` for a value of any kind, and take apart what only torch's pytree knows, too.

    So the outputs of Hugging Face models are trees.

    >>> leaves, restore = flatten_fully({"b": 2, "a": (1, "x")})
    >>> leaves
    [1, 'x', 2]
    >>> restore([10, "y", 20])
    {'b': 20, 'a': (10, 'y')}
    """
    outer, unflatten = flatten(tree)
    inner = [pytree.tree_flatten(leaf) for leaf in outer]

    def restore(leaves: Sequence[Any]) -> Any:
        remaining = iter(leaves)
        parts = [
            pytree.tree_unflatten([next(remaining) for _ in part], spec) for part, spec in inner
        ]
        return unflatten(parts)

    return [leaf for part, _ in inner for leaf in part], restore


def paths(tree: Tree, /) -> list[str]:
    """Return where each leaf stands, as the Python expression that reaches it from the tree.

    >>> paths({"layers": [1, 2], "head": 3})
    ["['head']", "['layers'][0]", "['layers'][1]"]
    """
    return [accessor.codify("") for accessor in optree.tree_accessors(tree)]


def map(fn: Callable[..., Any], tree: Tree, /, *rest: Tree) -> Tree:
    """Apply `fn` to corresponding leaves of trees of one structure.

    >>> map(lambda x, y: x - y, {"a": 3, "b": 5}, {"b": 1, "a": 1})
    {'a': 2, 'b': 4}
    """
    return optree.tree_map(fn, tree, *rest)


def names(tree: Tree, /) -> list[str]:
    """Return a name for each leaf: the keys, indices and fields on the way to it, joined by dots.

    >>> names({"layers": [1, 2], "head": 3})
    ['head', 'layers.0', 'layers.1']
    """
    return [".".join(str(key) for key in path) for path in optree.tree_paths(tree)]


def structure(tree: Tree, /) -> Any:
    """Return what two trees of one structure have in common; it compares and prints.

    >>> structure({"b": 1, "a": (2, None)}) == structure({"a": (3, None), "b": 4})
    True
    """
    return optree.tree_structure(tree)


def tensors_in(*trees: Any) -> list[Tensor]:
    """Return the tensors among the leaves of any trees, whatever else they hold.

    >>> tensors_in({"name": "first", "x": torch.ones(1)}, [2, torch.zeros(1)])
    [tensor([1.]), tensor([0.])]
    """
    return [leaf for leaf in flatten_fully(trees)[0] if isinstance(leaf, Tensor)]


def tensors_and_rest(tree: Tree, /) -> tuple[tuple[Tensor, ...], Unflatten]:
    """Return the tensors among the leaves and the function that puts tensors back beside the other leaves.

    >>> tensors, restore = tensors_and_rest({"loss": torch.ones(1), "name": "first"})
    >>> restore([torch.zeros(1)])
    {'loss': tensor([0.]), 'name': 'first'}
    """
    leaves, unflatten = flatten_fully(tree)
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def restore(tensors: Sequence[Any]) -> Tree:
        remaining = iter(tensors)
        return unflatten([next(remaining) if leaf is None else leaf for leaf in rest])

    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)), restore


# ------------------------------------------------------------------------------------ arithmetic


def add(x: Tree, y: Tree, /) -> Tree:
    """Return `x + y`.

    >>> add({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 2.0])})
    {'a': tensor([2., 3.])}
    """
    return map(torch.add, x, y)


def sub(x: Tree, y: Tree, /) -> Tree:
    """Return `x - y`.

    >>> sub({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 2.0])})
    {'a': tensor([ 0., -1.])}
    """
    return map(torch.sub, x, y)


def scale(a: float | Tensor, x: Tree, /) -> Tree:
    """Return `a * x`, each leaf in its own dtype.

    >>> scale(2, {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.float16)})
    {'a': tensor([2., 2.]), 'b': tensor([2.], dtype=torch.float16)}
    """
    return map(lambda leaf: _times(a, leaf), x)


def axpy(a: float | Tensor, x: Tree, y: Tree, /) -> Tree:
    """Return `a * x + y`, each leaf in the dtype of `y`'s leaf.

    >>> axpy(2, {"a": torch.ones(2)}, {"a": torch.tensor([1.0, 2.0])})
    {'a': tensor([3., 4.])}
    """
    return map(lambda x_leaf, y_leaf: y_leaf + _times(a, x_leaf), x, y)


def _times(a: float | Tensor, leaf: Tensor) -> Tensor:
    if isinstance(a, Tensor):
        a = a.to(dtype=leaf.dtype, device=leaf.device)
    return leaf * a


def dot(x: Tree, y: Tree, /) -> Tensor:
    """Return the real inner product of two trees, a 0-dim tensor on the first leaf's device.

    >>> dot({"a": torch.ones(2), "b": torch.tensor(3.0)}, {"b": torch.tensor(2.0), "a": torch.ones(2)})
    tensor(8.)
    """
    x_leaves, y_leaves = (
        optree.tree_flatten(x)[0],
        optree.tree_flatten(map(lambda _, leaf: leaf, x, y))[0],
    )
    parts = [_products(a, b).sum() for a, b in zip(x_leaves, y_leaves, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def batched_dot(x: Tree, y: Tree, /) -> Tensor:
    """Return the real inner products of two stacks of `k` trees, shape `(k,)`, on the first leaf's device.

    >>> batched_dot(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [5.0, 5.0]]))
    tensor([3., 5.])
    """
    x_leaves, y_leaves = flatten(x)[0], flatten(map(lambda _, leaf: leaf, x, y))[0]
    total: Tensor | None = None
    for a, b in zip(x_leaves, y_leaves, strict=True):
        products = _products(a, b)
        part = products.reshape(a.shape[0], a.shape[1:].numel()).sum(1)
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return the entrywise terms of the real inner product, in float32 for half precision."""
    if x.is_complex() or y.is_complex():
        return (x.conj() * y).real
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x * y


def norm(x: Tree, /) -> Tensor:
    """Return the Euclidean norm, a 0-dim tensor.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return dot(x, x).sqrt()


def numel(tree: Tree, /) -> int:
    """Return how many entries the leaves have together.

    >>> numel({"w": torch.zeros(2, 3), "b": torch.zeros(())})
    7
    """
    return sum(leaf.numel() for leaf in optree.tree_flatten(tree)[0])


def zeros_like(tree: Tree, /) -> Tree:
    """Return the zero vector of a tree's space.

    >>> zeros_like({"a": torch.ones(2)})
    {'a': tensor([0., 0.])}
    """
    return map(torch.zeros_like, tree)


def random_like(tree: Tree, /, *, generator: torch.Generator | None = None) -> Tree:
    """Return a vector of independent standard normal entries, shaped, typed and placed like `tree`.

    >>> v = random_like({"w": torch.zeros(2, 3)}, generator=torch.Generator().manual_seed(0))
    >>> v["w"].shape
    torch.Size([2, 3])
    """

    def draw(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device, generator=generator)

    return map(draw, tree)


def stack(trees: Sequence[Tree], /) -> Tree:
    """Stack trees along a new leading axis of every leaf.

    >>> stack([{"a": torch.zeros(2)}, {"a": torch.ones(2)}])
    {'a': tensor([[0., 0.],
            [1., 1.]])}
    """
    return map(lambda *leaves: torch.stack(leaves), *trees)


def unstack(stacked: Tree, /) -> list[Tree]:
    """Take a stacked tree apart along its leading axis.

    >>> unstack({"a": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
    [{'a': tensor([0., 0.])}, {'a': tensor([1., 1.])}]
    """
    leaves, unflatten = flatten(stacked)
    return [unflatten(row) for row in zip(*(leaf.unbind(0) for leaf in leaves), strict=True)]


def ravel(tree: Tree, /, *, batch_dims: int = 0) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Return the entries of a tree as one vector, and the function that folds such vectors back.

    Leaves follow one another in the order of `flatten`, dict keys sorted, in their common dtype, on the first leaf's
    device. `batch_dims` leading axes of every leaf are kept in front. The inverse takes any number
    of leading axes and restores each leaf's own dtype and device.

    >>> flat, unravel = ravel({"b": torch.tensor([3.0]), "a": torch.tensor([[1.0, 2.0]])})
    >>> flat
    tensor([1., 2., 3.])
    >>> unravel(flat)["a"]
    tensor([[1., 2.]])
    """
    leaves, unflatten = flatten(tree)
    dtype, device = common_dtype(tree), leaves[0].device
    shapes = [leaf.shape[batch_dims:] for leaf in leaves]
    sizes = [shape.numel() for shape in shapes]
    kinds = [(leaf.dtype, leaf.device) for leaf in leaves]
    rows = [
        leaf.reshape((*leaf.shape[:batch_dims], size)).to(dtype=dtype, device=device)
        for leaf, size in zip(leaves, sizes, strict=True)
    ]

    def unravel(vector: Tensor) -> Tree:
        pieces = vector.split(sizes, dim=-1)
        return unflatten(
            [
                piece.reshape((*vector.shape[:-1], *shape)).to(dtype=kind[0], device=kind[1])
                for piece, shape, kind in zip(pieces, shapes, kinds, strict=True)
            ]
        )

    return torch.cat(rows, dim=-1), unravel


def common_dtype(tree: Tree, /) -> torch.dtype:
    """Return the dtype to which all leaves promote.

    >>> common_dtype({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.float64)})
    torch.float64
    """
    leaves = optree.tree_flatten(tree)[0]
    dtype: torch.dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def basis(tree: Tree, start: int, stop: int, /) -> Tree:
    """Return unit vectors `start` to `stop - 1` of a tree's space, stacked along a leading axis.

    Unit vector `i` is one at entry `i` of `ravel(tree)`.

    >>> basis({"a": torch.zeros(2), "b": torch.zeros(1)}, 1, 3)
    {'a': tensor([[0., 1.],
            [0., 0.]]), 'b': tensor([[0.],
            [1.]])}
    """
    leaves, unflatten = flatten(tree)
    stacked, offset = [], 0
    for leaf in leaves:
        block = leaf.new_zeros((stop - start, leaf.numel()))
        first, last = max(start, offset), min(stop, offset + leaf.numel())
        if first < last:
            rows = torch.arange(first - start, last - start, device=leaf.device)
            block[rows, rows + (start - offset)] = 1
        stacked.append(block.reshape(stop - start, *leaf.shape))
        offset += leaf.numel()
    return unflatten(stacked)
