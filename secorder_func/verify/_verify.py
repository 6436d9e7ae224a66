"""The checks in their order, and what they leave behind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secorder_func import running, tree
from secorder_func.checks import check_callable, check_number, check_params
from secorder_func.errors import ArgumentError, ArgumentTypeError, message
from secorder_func.rules.inference import out_of_inference_mode
from secorder_func.rules.randomness import RandomState
from secorder_func.transforms.loss import Leaves
from secorder_func.typing import LossFn, Tree
from secorder_func.verify import _causes as causes
from secorder_func.verify import _derivatives as derivatives
from secorder_func.verify import _reach as reach
from secorder_func.verify import _value as values
from secorder_func.verify._evidence import Evidence, quoted
from secorder_func.verify._kept import Kept
from secorder_func.verify._problem import WHERE, Problem
from secorder_func.verify._result import Check, Verification
from secorder_func.verify._setting import Setting

__all__ = ["verify"]

_CHECKS = 12
"""How many there are where all is well; `shapes` and `mode` come on top where they have something to say."""


def verify(
    f: LossFn,
    params: Tree,
    *args: Any,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    **kwargs: Any,
) -> Verification:
    r"""Check at these parameters that the loss is what second derivatives need, and that its products are right.

    Parameters
    ----------
    f, params, args, kwargs
        As for `hvp`: `f(params, *args, **kwargs)` is the loss.
    generator
        Draws the directions; None: the same ones every time.
    rtol
        What exact answers may differ by, relative to their size. Default: the square root of the unit roundoff of the
        coarsest dtype in the loss, 1.5e-8 in float64 and 3.5e-4 in float32. Differences may be off by `rtol ** (2/3)`.

    Returns
    -------
    Verification
        True if no check failed; `print` it for a report with the likely causes. Its `checks`, in order:

        - `loss`: one finite real number; an error of the loss is quoted here.
        - `shapes`, only where it matters: outputs and targets that a loss function of torch broadcasts.
        - `mode`, only where it matters: the model is in training mode, with dropout or batch normalisation.
        - `repeatable`, `random numbers`: the same number again from the same random state; whether it draws any.
        - `gradient`, `gradient by differences`: finite, and the derivative of the loss.
        - `exact modes`, `product`: by which modes `H v` is possible, and that it is finite.
        - `agreement of modes`, `symmetry`: all modes agree; `u·Hv = v·Hu`.
        - `product by differences`: `H v` is the derivative of the gradient.
        - `dependence`: which parameters have no effect on the loss.
        - `state`: parameters, buffers and `.grad` are as they were.

        A check whose `passed` is None informs, or could not decide.

    Raises
    ------
    TypeError, ValueError
        An argument of `verify` itself is wrong, as for `hvp`; inside a transform of `torch.func`. A problem with the
        loss never raises: it is a check that fails.

    Notes
    -----
    Costs about 25 gradients (17 evaluations of the loss and their derivatives), and the memory of one product and of a
    copy of parameters and buffers. Where differences do not agree at once, up to 80 evaluations, some of them in
    float64, look for the cause.

    Differences are taken at several steps, and one that disagrees counts against a derivative only where they settle;
    otherwise the check says that it could not decide. In float32 what looks wrong is compared again in float64, half
    precision from the start. A derivative that is off by less than the tolerance goes unnoticed: for a sharper check,
    verify at parameters and data in float64. One random direction is tested, at one point.

    Torch's, Python's and NumPy's global generators are left as one plain evaluation leaves them. State of Python that
    the loss itself changes (a counter, an iterator) cannot be put back, and is named.

    Examples
    --------
    >>> import torch
    >>> from secorder_func import verify
    >>> p = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> result = verify(lambda p: (p**3).sum(), p)
    >>> result.ok
    True
    >>> result["symmetry"].finding
    'u·Hv and v·Hu differ by < 1e-16 of |u||Hv|, 1e-08 allowed'
    >>> print(verify(lambda p: p.log().sum(), torch.tensor([1.0, -1.0])))
    1 of 2 checks failed: loss.
    <BLANKLINE>
      FAILED  loss   the loss is nan
              expected  The function returns one finite real number, as a tensor.
              cause     log is the first function to return NaN or infinity
              mend      Keep its argument away from there: add a small number inside, or clamp it.
      ok      state  parameters and .grad are as they were
    """
    check_callable(f, WHERE)
    check_params(params, WHERE)
    _check_rest(params, generator, rtol)
    with out_of_inference_mode(), torch.no_grad():
        detached = tree.map(Tensor.detach, params)
        start = RandomState.now(tree.flatten(params)[0])
        problem = Problem(f, detached, args, kwargs, start)
        with running.task(WHERE, _CHECKS, "checks"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using a target size")  # the check of shapes
            return Verification(tuple(_checks(problem, params, generator, rtol)))


def _check_rest(params: Tree, generator: Any, rtol: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        given = type(generator).__name__
        problem = f"generator must be a torch.Generator, got {given}"
        raise ArgumentTypeError(message(WHERE, problem))
    if rtol is not None:
        check_number(rtol, WHERE, name="rtol")
        if not 0 < float(rtol) < 1:
            raise ArgumentError(message(WHERE, f"rtol must lie between 0 and 1, got {rtol}"))
    if any(leaf.is_meta for leaf in tree.flatten(params)[0]):
        mend = "Give it parameters with numbers in them"
        raise ArgumentError(message(WHERE, "params are on the meta device", mend))
    if torch._C._are_functorch_transforms_active():
        mend = "Call it outside"
        raise ArgumentError(message(WHERE, "it cannot run inside a transform", mend))


def _checks(
    problem: Problem, given: Tree, generator: torch.Generator | None, rtol: float | None
) -> list[Check]:
    """Make the checks as far as they make sense, and put back what the evaluations moved."""
    around = values.Surroundings.of(problem)
    modules = reach.modules_in(around.reached())
    kept = Kept(given, modules)
    loss, value, found = values.finite_number(problem)
    end, ends = RandomState.now(problem.leaves), around.states()
    checks = [loss]
    running.further(1)
    try:
        if value is not None and found is not None:
            checks += _present(values.shapes(found), values.mode(modules))
            checks += _further(problem, value, found, end, around, generator, rtol)
    finally:
        changed = kept.put_back()
        end.restore()
        around.restore(ends)
    checks.append(_state(changed, kept, around))
    return checks


def _present(*checks: Check | None) -> list[Check]:
    """Return the checks that there is something to say of, beside those that are counted."""
    return [check for check in checks if check is not None]


def _further(
    problem: Problem,
    value: Tensor,
    found: Evidence,
    end: RandomState,
    around: values.Surroundings,
    generator: torch.Generator | None,
    rtol: float | None,
) -> list[Check]:
    """Make the checks that need a value."""
    checks = [values.repeatability(problem, value, found.eps, around)]
    running.further(1)
    if not checks[0].passed:
        return checks
    checks.append(values.randomness(problem, value, end))
    running.further(1)
    generator = generator or torch.Generator().manual_seed(0)
    v, u = (_random_like(problem.leaves, generator) for _ in range(2))
    random = not values.same_state(problem.start, end)
    setting = Setting(problem, value, found, random, v, u, rtol)
    try:
        for check in _of_derivatives(setting):
            checks.append(check)
            running.further(1)
    except Exception as error:
        means = "Every evaluation of the loss goes as the first one did."
        checks.append(Check("further checks", False, quoted(error), means))
    return checks


def _of_derivatives(setting: Setting) -> Iterator[Check]:
    """Make the checks of derivatives; each needs those before it."""
    problem, found = setting.problem, setting.evidence
    check, gradient = derivatives.finite_gradient(problem)
    if not any(found.reached):
        yield values.dependence(problem, found, gradient, [])
        return
    yield check
    if gradient is None:
        yield values.dependence(problem, found, None, [])
        return
    first_order = derivatives.first_order(setting, gradient)
    yield first_order
    check, products = derivatives.products_by_mode(setting)
    yield check
    if products:
        check = derivatives.finite_products(setting, products)
        yield check
    if products and check.passed:
        mode = next(iter(products))
        if len(products) > 1:
            check = derivatives.agreement(setting, gradient, products)
            yield check
            if check.passed is False:
                mode = next(iter(derivatives.right(setting, products)), mode)
        yield derivatives.symmetry(setting, gradient, mode, products[mode])
        right = first_order.passed is not False
        yield derivatives.second_order(setting, mode, products[mode], gradient_right=right)
    yield values.dependence(problem, found, gradient, list(products.values()))


def _random_like(leaves: Leaves, generator: torch.Generator) -> Leaves:
    """Draw standard normal entries where the generator is."""
    return tuple(
        torch.randn(leaf.shape, dtype=leaf.dtype, device=generator.device, generator=generator).to(
            leaf.device
        )
        for leaf in leaves
    )


def _state(changed: list[str], kept: Kept, around: values.Surroundings) -> Check:
    """Say what the evaluations changed."""
    name, means = "state", "Evaluating and differentiating the loss changes nothing."
    if changed:
        finding = f"changed, and put back: {causes.listed(changed)}"
        return Check(name, False, finding, means, causes=causes.written_to(changed))
    buffers = f", {kept.num_buffers} buffers" if kept.num_buffers else ""
    finding = f"parameters{buffers} and .grad are as they were"
    moved = around.changed()
    if moved:
        finding += f"\nbut the loss changes what it reaches, at every call: {causes.listed(moved)}"
    return Check(name, True, finding, means)
