"""The demonstration's model, trained for a moment, as an example for `verify` and `report`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from secorder_func import functional_loss, functional_model
from secorder_func.report import digits
from secorder_func.report.demo import QUICK, Settings
from secorder_func.report.progress import Advance
from secorder_func.report.subject import Subject
from secorder_func.verify.command import UserProblem, verify_and_print

__all__ = ["digits_subject", "verify_digits"]


def digits_subject(settings: Settings, *, seed: int, advance: Advance) -> Subject:
    """Train the network of the demonstration and return its mean loss on the training digits."""
    generator = torch.Generator().manual_seed(seed)
    data = digits.load(num_train=settings.num_train, generator=generator)
    model = digits.make_model(settings.hidden, generator=generator)
    fit = digits.train(model, data, num_steps=settings.num_steps, advance=advance)
    f, params = functional_loss(model, F.cross_entropy)
    model_fn, _ = functional_model(model)
    return Subject(
        f"a {digits.SIDE**2}-{settings.hidden}-{digits.CLASSES} tanh network that reads "
        f"{settings.num_train} handwritten digits",
        f,
        params,
        (data.train_inputs, data.train_labels),
        None,
        model_fn,
        F.cross_entropy,
        image_shape=(digits.SIDE, digits.SIDE),
        facts=(f"{fit.test_accuracy:.1%} of the test digits read rightly",),
    )


def verify_digits(*, seed: int, rtol: float | None) -> int:
    """Verify the loss of the digit network; return the exit code."""
    subject = digits_subject(QUICK, seed=seed, advance=lambda steps: None)
    problem = UserProblem(subject.f, subject.params, subject.first_batch)
    code = verify_and_print(
        f"The demonstration's model: {subject.title}", problem, seed=seed, rtol=rtol
    )
    if code == 2:
        return code
    print(
        "\nYour own problem: python -m secorder_func verify package.module:function\n"
        "The function takes no arguments and returns (model, loss_fn, inputs, targets) or (f, params, *args); "
        "a DataLoader will do in place of the data."
    )
    return code
