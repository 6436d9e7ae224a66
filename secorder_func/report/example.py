"""The demonstration's model, trained for a moment, as an example for `verify`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from secorder_func.nn import functional_loss
from secorder_func.report import digits
from secorder_func.report.demo import QUICK
from secorder_func.verify.command import UserProblem, verify_and_print

__all__ = ["verify_digits"]


def verify_digits(*, seed: int, rtol: float | None) -> int:
    """Verify the loss of the digit network; return the exit code."""
    generator = torch.Generator().manual_seed(seed)
    data = digits.load(num_train=QUICK.num_train, generator=generator)
    model = digits.make_model(QUICK.hidden, generator=generator)
    digits.train(model, data, num_steps=QUICK.num_steps, advance=lambda steps: None)
    f, params = functional_loss(model, F.cross_entropy)
    problem = UserProblem(f, params, (data.train_inputs, data.train_labels))
    code = verify_and_print(
        f"The demonstration's model: a {digits.SIDE**2}-{QUICK.hidden}-{digits.CLASSES} tanh network that reads "
        f"{QUICK.num_train} handwritten digits",
        problem,
        seed=seed,
        rtol=rtol,
    )
    if code == 2:
        return code
    print(
        "\nYour own problem: python -m secorder_func verify package.module:function\n"
        "The function takes no arguments and returns (f, params, *args) or (model, loss_fn, inputs, targets)."
    )
    return code
