"""What is likely behind a failure, and what mends it, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from secorder_func.verify._evidence import Evidence
from secorder_func.verify._lenses import Shape
from secorder_func.verify._result import Cause

__all__ = [
    "all_modes_refuse",
    "asymmetric",
    "broadcasts",
    "grows",
    "listed",
    "modes_differ",
    "no_dependence",
    "not_finite",
    "not_repeatable",
    "of_gradient",
    "of_product",
    "of_shapes",
    "undecided",
    "written_to",
]


def not_finite(
    places: Sequence[str] = (), *, function: str = "", derivative_of: str = ""
) -> tuple[Cause, ...]:
    """Return the causes of NaN and infinity.

    Parameters
    ----------
    places
        Where the parameters and arguments have them already.
    function, derivative_of
        The function that made the first one out of finite numbers; the function whose derivative did.
    """
    if places:
        return (
            Cause(
                f"there is NaN or infinity in {listed(places)}", "Look at where these come from."
            ),
        )
    mend = "Keep its argument away from there: add a small number inside, or clamp it."
    if function:
        what = f"{function} is the first function to return NaN or infinity"
        return (Cause(what, mend),)
    found = []
    if derivative_of:
        what = f"the derivative of {derivative_of} is the first to be NaN on the way back"
        found.append(Cause(what, mend))
    return (
        *found,
        Cause(
            "a root, a norm or a power below two at zero, a logarithm at zero, an overflow; also in the branch of a "
            "torch.where that is not taken, whose derivative is multiplied by zero",
            "Write sqrt(x + 1e-12), use log_softmax, logsumexp or xlogy, and put the torch.where around the argument.",
        ),
    )


def no_dependence(evidence: Evidence) -> tuple[Cause, ...]:
    """Return the causes of a loss without any parameter in its history."""
    if evidence.holds or evidence.numbers:
        return (
            Cause(
                f"{listed([*evidence.holds, *evidence.numbers])} in the loss cuts it off from its parameters",
                "Take that out.",
            ),
        )
    if evidence.cuts:
        return (
            Cause(
                f"the loss does not depend differentiably on its parameters: {listed(evidence.cuts)} has no derivative",
                "Return a smooth loss, as the one that is trained: cross-entropy in the place of the accuracy.",
            ),
        )
    return (
        Cause(
            "the function computes with tensors that it captures (the model's own parameters, say), not with those "
            "that it is given",
            "Make it with functional_loss(model, loss_fn), or evaluate the model with "
            "torch.func.functional_call(model, params, inputs).",
        ),
    )


def not_repeatable(
    sources: Sequence[str], iterators: Sequence[str], changed: Sequence[str], relative: float
) -> tuple[Cause, ...]:
    """Return the causes of a loss with another value the second time; `sources` are shown by experiment."""
    if sources:
        return (
            Cause(
                f"{listed(sources)}: with its state put back the loss has the same value again",
                "Draw by torch's global generator (torch.rand, dropout), which the library replays, or draw once, "
                "outside of the loss, and pass the numbers as an argument.",
            ),
        )
    found = []
    if iterators:
        found.append(
            Cause(
                f"the loss reaches an iterator, {listed(iterators)}, which gives something else at every call",
                "Take a batch once, outside of the loss, and pass it as an argument: f(params, x, y).",
            )
        )
    if changed:
        found.append(
            Cause(
                f"between the evaluations {listed(changed)}",
                "Let the loss depend on its arguments alone, and pass such a value as one of them.",
            )
        )
    if found:
        return tuple(found)
    kernels = Cause(
        "a kernel of torch that adds in another order every time",
        "Call torch.use_deterministic_algorithms(True), or take it as rounding and raise rtol.",
    )
    others = Cause(
        "something outside of the arguments: a batch iterator, a counter, a clock, a file, another thread",
        "Let the loss depend on its arguments alone.",
    )
    return (kernels, others) if relative < 1e-3 else (others, kernels)


def written_to(names: Sequence[str]) -> tuple[Cause, ...]:
    """Return the causes of changed tensors."""
    return (
        Cause(
            f"the loss changed {listed(names)} past torch (by NumPy, an extension, another thread); it was "
            "put back",
            "Let the loss write to copies, made inside of it.",
        ),
    )


def of_gradient(evidence: Evidence, *, jumps: bool, kink: bool, freed: bool) -> tuple[Cause, ...]:
    """Return the causes of a gradient that is not the derivative of the loss.

    Parameters
    ----------
    evidence
        What is in the loss.
    jumps
        The loss jumps at the parameters.
    kink
        The gradient jumps there.
    freed
        The gradient is right where `detach`, `.data` and `no_grad` hold nothing constant.
    """
    if freed:
        return (
            Cause(
                f"{listed(evidence.holds)} in the loss: with nothing held constant the two agree. Derivatives take "
                "what it holds as a constant, a difference moves it with the parameters",
                "If it is not meant, take it out. If it is (a target, a straight-through estimator), compute what is "
                "held constant outside, pass it as an argument and verify that: products take it as a constant too.",
            ),
        )
    if kink:
        return (_at_kink(evidence),)
    if jumps:
        functions = listed(evidence.steps) if evidence.steps else "rounding, a comparison, argmax"
        return (
            Cause(
                f"the loss jumps at these parameters: {functions}",
                "Replace the function by a smooth one, or verify at parameters away from the jump.",
            ),
        )
    found = []
    if evidence.customs:
        found.append(
            Cause(
                f"the backward of {_functions(evidence.customs)} is not the derivative of its forward",
                "Compare the two by torch.autograd.gradcheck.",
            )
        )
    if evidence.numbers:
        found.append(
            Cause(
                f"{listed(evidence.numbers)} turns what depends on the parameters into a constant",
                "Compute with the tensor itself.",
            )
        )
    if evidence.holds:
        found.append(
            Cause(
                f"{listed(evidence.holds)} in the loss holds a part of it constant, which a difference moves",
                "Take it out, or compute what is held constant outside and pass it as an argument.",
            )
        )
    if evidence.steps:
        found.append(
            Cause(
                f"{listed(evidence.steps)} has a derivative of zero and moves in steps",
                "Replace it by a smooth function.",
            )
        )
    return tuple(found) or (
        Cause(
            "a derivative of torch's that is wrong, or a part of the loss that autograd does not see",
            "Halve the loss until the part is found; torch.autograd.gradcheck checks a single function.",
        ),
    )


def of_product(
    evidence: Evidence, *, jumps: bool, precision: bool, gradient_right: bool
) -> tuple[Cause, ...]:
    """Return the causes of a product that is not the derivative of the gradient.

    Parameters
    ----------
    evidence
        What is in the loss.
    jumps
        The gradient jumps at the parameters.
    precision
        In double precision the product is right.
    gradient_right
        The gradient is the derivative of the loss.
    """
    if precision:
        return (
            Cause(
                "rounding: the same product in float64 agrees",
                "Make parameters and data .double() for this product.",
            ),
        )
    if jumps and gradient_right:
        return (_at_kink(evidence),)
    if not gradient_right:
        return (Cause("the gradient itself is not right, see above", "Mend the gradient first."),)
    if evidence.customs:
        return (
            Cause(
                f"the backward of {_functions(evidence.customs)} is right, but its own derivative is not: it computes "
                "with constants (numbers kept on ctx, .data, no_grad, NumPy)",
                "Compute the backward from ctx.saved_tensors by functions of torch, and compare by "
                "torch.autograd.gradgradcheck.",
            ),
        )
    return (
        Cause(
            "a second derivative of torch's that is wrong",
            "Halve the loss until the function is found (torch.autograd.gradgradcheck checks a single one), and report "
            "it to this library, which has a table of repairs.",
        ),
    )


def undecided(evidence: Evidence, *, double: bool) -> tuple[Cause, ...]:
    """Return why differences did not settle."""
    found = []
    if evidence.kinks:
        found.append(
            Cause(
                f"kinks between the points of a difference: {listed(evidence.kinks)}",
                "Verify with smooth functions in their place (softplus, GELU), or at fewer samples.",
            )
        )
    if not double and evidence.eps > 1e-10:
        found.append(
            Cause(
                "rounding, and the loss could not be evaluated in float64",
                "Verify with parameters and data .double().",
            )
        )
    return tuple(found) or (
        Cause(
            "the loss bends too sharply for the step of a difference, or rounds more than its dtype says",
            "Verify at other parameters, or with parameters of the order of one.",
        ),
    )


def all_modes_refuse(evidence: Evidence, reasons: Sequence[str]) -> tuple[Cause, ...]:
    """Return the causes of a loss without exact products; `reasons` are what torch says."""
    if any("saved tensor hooks" in reason for reason in reasons):
        return (
            Cause(
                "activation checkpointing, or another use of saved tensor hooks, which torch.func does not know",
                "Evaluate without it. The closures of secorder_func.compat take checkpoints with use_reentrant=False.",
            ),
        )
    if any("data pointer" in reason for reason in reasons):
        return (
            Cause(
                "the loss hands a tensor to NumPy or to an extension, which torch.func cannot look into",
                "Do that part before, and pass its result as an argument.",
            ),
        )
    if evidence.customs:
        return (
            Cause(
                f"{_functions(evidence.customs)} is not written for torch.func, or cannot be differentiated twice",
                "Split forward(ctx, x) into forward(x) and setup_context(ctx, inputs, output), and compute the "
                "backward by functions of torch. Until then finite_difference_hvp estimates products.",
            ),
        )
    return (
        Cause(
            "torch has no second derivative for a function of the loss; the reasons above name it",
            "Replace the function, or estimate products by finite_difference_hvp.",
        ),
    )


def modes_differ(evidence: Evidence, right: Sequence[str]) -> tuple[Cause, ...]:
    """Return the causes of modes that disagree; `right` are those that differences agree with."""
    side = f" Differences side with {listed(right)}." if right else ""
    if evidence.customs:
        return (
            Cause(
                f"the backward or the jvp of {_functions(evidence.customs)} is not a derivative.{side}",
                "Compare them by torch.autograd.gradcheck(..., check_forward_ad=True) and gradgradcheck.",
            ),
        )
    return (
        Cause(
            f"a function of torch has a wrong derivative in one of the modes.{side}",
            "Name the right mode in your calls, mode=..., and report the loss to this library.",
        ),
    )


def asymmetric(evidence: Evidence) -> tuple[Cause, ...]:
    """Return the causes of an asymmetric matrix."""
    if evidence.customs:
        return (
            Cause(
                f"the backward of {_functions(evidence.customs)} is not the derivative of any function",
                "Compare it with its forward by torch.autograd.gradcheck.",
            ),
        )
    return (
        Cause(
            "a function of torch has a wrong derivative",
            "Halve the loss until the function is found, and report it to this library.",
        ),
    )


def grows(outputs: Shape, targets: Shape) -> bool:
    """Say whether two shapes are broadcast to one that neither of them has, and nobody seems to have meant it."""
    meant = len(outputs) == len(targets) and math.prod(outputs) != math.prod(targets)
    return not meant and torch.broadcast_shapes(outputs, targets) not in (outputs, targets)


def broadcasts(outputs: Shape, targets: Shape) -> str:
    """Say what shapes a loss function compares."""
    both = tuple(torch.broadcast_shapes(outputs, targets))
    return (
        f"the loss broadcasts outputs of shape {outputs} and targets of shape {targets} to {both}"
    )


def of_shapes(outputs: Shape, targets: Shape) -> tuple[Cause, ...]:
    """Return the cause of outputs and targets that are compared each with all."""
    return (
        Cause(
            "every output is compared with every target, not with its own",
            f"Use {_same_shape(outputs, targets)}.",
        ),
    )


def _same_shape(outputs: Shape, targets: Shape) -> str:
    for axis in range(len(outputs)):
        if (*targets[:axis], 1, *targets[axis:]) == outputs:
            return f"targets.unsqueeze({axis})"
    for axis in range(len(targets)):
        if targets[axis] == 1 and (*targets[:axis], *targets[axis + 1 :]) == outputs:
            return f"targets.squeeze({axis})"
    if math.prod(outputs) == math.prod(targets):
        return "targets.view_as(outputs)"
    return "targets of the shape of the outputs"


def _at_kink(evidence: Evidence) -> Cause:
    functions = f" ({listed(evidence.kinks)})" if evidence.kinks else ""
    return Cause(
        f"the parameters are on a kink of the loss{functions}, or nearer to one than the smallest step: the gradient "
        "jumps there, and no Hessian exists",
        "Move the parameters off it (biases off zero, say): products are those of the side that torch takes.",
    )


def _functions(names: Sequence[str]) -> str:
    return f"the autograd.Function {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """Return `a, b and c`."""
    shown = list(names[:5]) + ([f"{len(names) - 5} more"] if len(names) > 5 else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
