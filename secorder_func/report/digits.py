"""The problem of the demonstration: handwritten digits, a small network, its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["SIDE", "Digits", "Fit", "load", "make_model", "train"]

SIDE = 8
CLASSES = 10
_BRIGHTEST = 16.0


@dataclass(frozen=True, eq=False)
class Digits:
    """The digits that come with scikit-learn, split at random.

    Attributes
    ----------
    train_inputs, test_inputs
        `(num_samples, 64)`, float64, from 0 to 1.
    train_labels, test_labels
        `(num_samples,)`, from 0 to 9.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Fit:
    """How well a trained model does: the mean cross-entropy and the shares of digits read rightly."""

    train_loss: float
    train_accuracy: float
    test_accuracy: float


def load(*, num_train: int, generator: torch.Generator) -> Digits:
    """Return `num_train` digits to train on and a fifth of all 1797 to test on, none in both."""
    data = load_digits()
    inputs = torch.tensor(data.data / _BRIGHTEST, dtype=torch.float64)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=generator)
    test, rest = order[: len(labels) // 5], order[len(labels) // 5 :]
    train = rest[:num_train]
    return Digits(inputs[train], labels[train], inputs[test], labels[test])


def make_model(hidden: int, *, generator: torch.Generator) -> nn.Sequential:
    """Return a network with one hidden layer of tanh, smooth so that its Hessian exists everywhere."""
    seed = int(torch.randint(2**31, (), generator=generator))
    # torch's initial parameters come from the global generator, which is not ours to move.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(SIDE * SIDE, hidden, dtype=torch.float64),
            nn.Tanh(),
            nn.Linear(hidden, CLASSES, dtype=torch.float64),
        )


def train(
    model: nn.Module, digits: Digits, *, num_steps: int, advance: Callable[[int], None]
) -> Fit:
    """Train in place with Adam on all training digits at once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(digits.train_inputs), digits.train_labels).backward()
        optimizer.step()
        advance(1)
    with torch.no_grad():
        loss = F.cross_entropy(model(digits.train_inputs), digits.train_labels).item()
        return Fit(
            loss,
            _accuracy(model(digits.train_inputs), digits.train_labels),
            _accuracy(model(digits.test_inputs), digits.test_labels),
        )


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels).double().mean().item()
