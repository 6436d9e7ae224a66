"""Hugging Face models, built from small random configurations: encoder and decoders with their default attention.

The answer is double backward through the same weights with attention written out ("eager" in `transformers`).
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder_func import functional_loss, hessian_operator, hutchinson_trace, hvp
from secorder_func.compat.core.hvp import (
    approximate_hvp,
    exact_hvp,
    gauss_newton_product,
    model_hvp,
)
from tests import oracles
from tests.compat.closures import same, snapshot
from tests.situations.entries import CLOSURES, ENTRIES, GAUSS_NEWTON, Case, double_backward
from tests.situations.entries import gauss_newton as gauss_newton_answer

# Never ask a server for anything: every model here is made from its configuration.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"


def _imported() -> Any:
    """Return the package, or skip with the reason: it is missing, or does not fit this torch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its own dependencies deprecate
            package = importlib.import_module("transformers")
            for name in ("BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"):
                getattr(package, name)
    except Exception as error:
        pytest.skip(f"transformers cannot be imported: {error}", allow_module_level=True)
    return package


transformers = _imported()


class Named(nn.Module):
    """A model called with a batch of keywords, as the `Trainer` calls it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.inner(**batch)


def _bert(attention: str, dropout: float) -> Any:
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2(attention: str, dropout: float) -> Any:
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
        loss_type="ForCausalLM",
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(attention: str, dropout: float) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[str, float], Any]] = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}
RTOL = {torch.float32: 1e-5, torch.float64: 1e-6}
"""In float64 the models still take softmax, norms or the loss in float32, whose rounding is left."""


@cache
def _weights(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = MODELS[name]("eager", 0.0).state_dict()
    return {key: t + 0.1 * torch.randn_like(t) if t.ndim else t for key, t in state.items()}


def _model(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> Any:
    model = MODELS[name](attention, dropout)
    model.load_state_dict(_weights(name))
    return model.to(dtype).train()


def _batch(name: str, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids}
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 4:], mask[2, 3:] = 0, 0
        batch["attention_mask"] = mask
    causal = ids.masked_fill(mask == 0, -100)
    return {**batch, "labels": torch.tensor([0, 2, 1]) if name == "bert" else causal}


def _own_loss(output: Any, y: Any) -> Tensor:
    return output.loss


def _case(
    name: str, dtype: torch.dtype = torch.float64, padded: bool = True, dropout: float = 0.0
) -> Case:
    """Return a model with its own loss, and the same weights with attention written out as the truth."""
    model = _model(name, "sdpa", dtype, dropout)
    truth = _model(name, "eager", dtype, dropout)
    assert (model.config._attn_implementation, truth.config._attn_implementation) == (
        "sdpa",
        "eager",
    )
    return Case(Named(model), _own_loss, (_batch(name, padded),), truth=_Tupled(Named(truth)))


class _Tupled(nn.Module):
    """A module of one argument called with a tuple of it, which functional_loss spreads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: tuple[Any, ...]) -> Any:
        return self.inner(*inputs)


def _for(entry: str, case: Case) -> Case:
    """Return the case as an entry point calls it: closures and model_hvp give the tuple as it is."""
    if entry not in CLOSURES and entry != "gauss_newton_product":
        return case
    return Case(_Tupled(case.model), case.loss_fn, case.x, case.y, case.truth)


def _assert_product(entry: str, case: Case, rtol: float, seed: int | None = None) -> None:
    v = case.vector()
    torch.manual_seed(seed or 0)
    expected = double_backward(case, v)
    torch.manual_seed(seed or 0)
    oracles.assert_same(ENTRIES[entry](_for(entry, case), v), expected, rtol)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_product_is_that_of_attention_written_out(
    entry: str, name: str, dtype: torch.dtype, padded: bool
) -> None:
    _assert_product(entry, _case(name, dtype, padded), RTOL[dtype])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_in_training_mode_the_dropout_is_that_of_one_evaluation(entry: str, name: str) -> None:
    case = _case(name, dropout=0.3)
    torch.manual_seed(1)
    first = case.truth(case.x).loss
    torch.manual_seed(2)
    assert float(first.detach()) != float(case.truth(case.x).loss.detach())
    _assert_product(entry, case, RTOL[torch.float64], seed=5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_left_bit_identical_and_still_trains(name: str) -> None:
    case, twin = _case(name), _case(name)
    before = snapshot(case.model)
    for entry in ENTRIES:
        ENTRIES[entry](_for(entry, case), case.vector())
    assert same(before, snapshot(case.model))
    assert all(type(p) is nn.Parameter for p in case.params)
    (batch,) = case.x
    case.model(batch).loss.backward()
    twin.model(batch).loss.backward()
    pairs = zip(case.params, twin.params, strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if q.grad is not None)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_of_keys_and_values_makes_no_difference(name: str, use_cache: bool) -> None:
    model = _model(name)
    assert model.config.use_cache
    model.config.use_cache = use_cache
    batch = _batch(name, padded=True)
    assert (model(**batch).past_key_values is not None) is use_cache
    expected = double_backward(_case(name), _case(name).vector())
    f, params = functional_loss(model, _own_loss)
    v = oracles.random_like(list(params.values()), 1)
    hv = hvp(f)(params, dict(zip(params, v, strict=True)), batch, None)
    oracles.assert_same(list(hv.values()), expected, RTOL[torch.float64])


def _on_logits(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, -2), y.flatten(), ignore_index=-100)


def _plainly_called(name: str) -> Case:
    batch = _batch(name, padded=True)
    y = batch["labels"]
    return Case(_model(name), _on_logits, batch["input_ids"], y, _model(name, "eager"))


@pytest.mark.parametrize("name", MODELS)
def test_model_hvp_takes_a_model_as_it_is(name: str) -> None:
    case = _plainly_called(name)
    v = case.vector()
    found = model_hvp(case.model, case.loss_fn, case.x, case.y, v)
    oracles.assert_same(found, double_backward(case, v), RTOL[torch.float64])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entry", GAUSS_NEWTON)
def test_gauss_newton_products_see_through_the_outputs_of_models(entry: str, name: str) -> None:
    case = _plainly_called(name)
    v = case.vector()
    expected = gauss_newton_answer(case, v, output=lambda outputs: outputs.logits)
    oracles.assert_same(GAUSS_NEWTON[entry](case, v), expected, RTOL[torch.float64])


@pytest.mark.parametrize("name", MODELS)
def test_a_gauss_newton_product_with_a_graph_sees_through_them_too(name: str) -> None:
    case = _plainly_called(name)
    v = case.vector()
    expected = gauss_newton_answer(case, v, output=lambda outputs: outputs.logits)
    found = gauss_newton_product(case.model, case.loss_fn, case.x, case.y, v, create_graph=True)
    oracles.assert_same([h.detach() for h in found], expected, RTOL[torch.float64])


def _checkpoint(model: Any) -> None:
    # transformers 5 has another name for it, which older versions lack.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.filterwarnings("ignore::secorder_func.CurvatureFallbackWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("entry", CLOSURES)
def test_gradient_checkpointing_is_exact_in_closures(entry: str, name: str, dropout: float) -> None:
    case = _case(name, dropout=dropout)
    case.model.inner.config.use_cache = False
    _checkpoint(case.model.inner)
    _assert_product(entry, case, RTOL[torch.float64], seed=5)


@pytest.mark.parametrize("name", MODELS)
def test_the_operator_serves_estimates(name: str) -> None:
    f, params = functional_loss(_model(name, dropout=0.2), _own_loss)
    op = hessian_operator(f, params, _batch(name, padded=True), None)
    trace = hutchinson_trace(op, 8, generator=torch.Generator().manual_seed(0))
    v = oracles.random_like(params, 1)
    w = oracles.random_like(params, 2)
    assert float(trace.value) != 0
    torch.testing.assert_close(oracles.dot(w, op @ v), oracles.dot(v, op @ w), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_differences_agree_to_their_accuracy(name: str) -> None:
    case = _case(name, torch.float32)
    closures = _for("exact_hvp", case)
    v = case.vector()
    exact = exact_hvp(closures.closure, case.params, v)
    # The models take parts in float32 whatever the dtype of their parameters.
    oracles.assert_same(approximate_hvp(closures.closure, case.params, v), exact, rtol=2e-2)
