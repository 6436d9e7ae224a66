from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secorder_func import filter_normalized, random_direction, tree
from tests import oracles


def _params() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "kernel": torch.randn(4, 3, 2, 2, dtype=torch.float64),
        "bias": torch.randn(4, dtype=torch.float64),
        "dense": torch.randn(2, 5),
        "scale": torch.tensor(3.0),
    }


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_filter_has_the_norm_of_its_filter() -> None:
    params = _params()
    d = random_direction(params, generator=_generator())
    for name in ("kernel", "dense"):
        torch.testing.assert_close(
            d[name].flatten(1).norm(dim=1), params[name].flatten(1).norm(dim=1)
        )
        assert oracles.relative_error(d[name], params[name]) > 0.5
    assert not d["bias"].any()
    assert d["scale"] == 0


def test_filters_keep_their_direction() -> None:
    params = _params()
    drawn = random_direction(params, generator=_generator(), normalize=None)
    d = filter_normalized(drawn, params)
    for got, was in zip(d["kernel"], drawn["kernel"], strict=True):
        torch.testing.assert_close(got / got.norm(), was / was.norm())
    same = random_direction(params, generator=_generator())
    assert all(torch.equal(d[name], same[name]) for name in params)


def test_vectors_can_be_scaled_instead() -> None:
    params = _params()
    d = random_direction(params, generator=_generator(), vectors="scale")
    torch.testing.assert_close(d["bias"].norm(), params["bias"].norm())
    torch.testing.assert_close(d["scale"].abs(), params["scale"])


def test_leaves_or_the_whole_have_norm_one() -> None:
    params = _params()
    leafwise = random_direction(params, generator=_generator(), normalize="leaf")
    assert all(float(leaf.norm()) == pytest.approx(1) for leaf in leafwise.values())
    whole = random_direction(params, generator=_generator(), normalize="global")
    assert float(tree.norm(whole)) == pytest.approx(1)


def test_entries_are_standard_normal_and_independent_of_the_global_state() -> None:
    state = torch.get_rng_state()
    d = random_direction(torch.zeros(40_000), generator=_generator(), normalize=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float(d.mean())) < 4 / 200
    assert abs(float(d.square().mean()) - 1) < 4 * 2**0.5 / 200


def test_seeds_differ_and_repeat() -> None:
    params = _params()
    one, again, other = (random_direction(params, generator=_generator(s)) for s in (1, 1, 2))
    assert torch.equal(one["kernel"], again["kernel"])
    assert oracles.relative_error(one, other) > 0.5


def test_zero_filters_give_zeros_and_no_nan() -> None:
    params = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    d = filter_normalized(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), params)
    assert torch.equal(d, torch.zeros(2, 2))


@pytest.mark.parametrize("normalize", ["filter", "leaf", "global", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_any_dtype_and_empty_leaves(normalize: Any, dtype: torch.dtype) -> None:
    params = [torch.ones(3, 2, dtype=dtype), torch.ones(0, 2, dtype=dtype), torch.ones(2, 0)]
    d = random_direction(params, generator=_generator(), normalize=normalize)
    assert [(leaf.dtype, leaf.shape) for leaf in d] == [(p.dtype, p.shape) for p in params]
    assert d[0].isfinite().all()
    assert d[0].count_nonzero() == 6


def test_the_direction_carries_no_graph() -> None:
    d = random_direction(torch.ones(2, 2, requires_grad=True))
    assert not d.requires_grad


@pytest.mark.parametrize(
    ("params", "options", "text"),
    [
        (torch.ones(3), {}, "would be zero"),
        (torch.ones(3, 2), {"normalize": "layer"}, "normalize must be"),
        (torch.ones(3, 2), {"vectors": "keep"}, "vectors must be"),
        ([], {}, "no tensor"),
    ],
)
def test_what_makes_no_direction_is_refused(params: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        random_direction(params, **options)


def test_a_direction_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match="direction must match params"):
        filter_normalized(torch.ones(2, 3), torch.ones(3, 2))
