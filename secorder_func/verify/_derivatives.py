"""Checks of the gradient and of the exact products, among themselves and against differences."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from typing import get_args

import torch
from torch import Tensor

from secorder_func import tree
from secorder_func.transforms.loss import Leaves
from secorder_func.typing import Mode
from secorder_func.verify import _causes as causes
from secorder_func.verify._differences import NOTHING, Comparison, Precision, compare, finite, size
from secorder_func.verify._evidence import first_line, quoted
from secorder_func.verify._problem import Problem
from secorder_func.verify._result import Cause, Check
from secorder_func.verify._setting import Decision, Setting, places

__all__ = [
    "EXACT_MODES",
    "agreement",
    "finite_gradient",
    "finite_products",
    "first_order",
    "products_by_mode",
    "right",
    "second_order",
    "symmetry",
]

EXACT_MODES: tuple[Mode, ...] = tuple(mode for mode in get_args(Mode) if mode != "auto")
_FLOOR = 16  # in unit roundoffs of the gradient: below, products are zero to rounding


# ------------------------------------------------------------------------------------- gradient


def finite_gradient(problem: Problem) -> tuple[Check, Leaves | None]:
    """Take the gradient."""
    name, means = "gradient", "The gradient exists and is finite."
    try:
        gradient = problem.gradient(problem.leaves)
    except Exception as error:
        return Check(name, False, quoted(error), means), None
    if finite(gradient):
        return Check(name, True, f"finite, of norm {size(gradient):.3g}", means), gradient
    at = places(problem, gradient, _not_finite)
    finding = f"not finite at {causes.listed(at)}"
    cause = causes.not_finite(derivative_of=_first_nan(problem, None))
    return Check(name, False, finding, means, causes=cause), None


def first_order(setting: Setting, gradient: Leaves) -> Check:
    """Compare the gradient with differences of the loss."""
    name, means = "gradient by differences", "The gradient is the derivative of the loss."
    direction = _direction(setting, gradient)

    def trial(problem: Problem, precision: Precision) -> Comparison:
        along = setting.like(problem, direction)
        slope = tree.dot(along, problem.gradient(problem.leaves))
        return compare(
            lambda at: (problem.value(at).to(slope.dtype),),
            problem.leaves,
            along,
            (slope,),
            precision=precision,
        )

    decision = setting.decide(trial)
    comparison = decision.comparison
    what = "differences of the loss"
    if comparison.verdict == "agrees":
        return _agreed(name, what, means, decision, setting)
    if comparison.verdict == "undecided":
        return _undecided(name, what, means, decision, setting)
    cause = causes.of_gradient(
        setting.evidence,
        jumps=comparison.verdict == "jumps",
        kink=_gradient_jumps(setting, decision, direction),
        freed=_freed(setting, decision, direction),
    )
    return _off(name, what, means, decision, setting, cause)


def _direction(setting: Setting, gradient: Leaves) -> Leaves:
    """Return a random direction that leans to the gradient, leaf by leaf: a random one is nearly orthogonal to it."""
    return tuple(
        v + (g * (g.numel() ** 0.5 / n) if (n := size((g,))) > 0 else 0)
        for v, g in zip(setting.v, gradient, strict=True)
    )


def _gradient_jumps(setting: Setting, decision: Decision, direction: Leaves) -> bool:
    along = setting.like(decision.problem, direction)
    zero = tuple(torch.zeros_like(leaf) for leaf in along)
    problem = decision.problem
    found = compare(problem.gradient, problem.leaves, along, zero, precision=decision.precision)
    return found.verdict == "jumps"


def _freed(setting: Setting, decision: Decision, direction: Leaves) -> bool:
    """Say whether the gradient is right where nothing in the loss is held constant."""
    if not setting.evidence.holds:
        return False
    problem = decision.problem.holding_nothing()
    along = setting.like(decision.problem, direction)
    try:
        slope = tree.dot(along, problem.gradient(problem.leaves))
        found = compare(
            lambda at: (problem.value(at).to(slope.dtype),),
            problem.leaves,
            along,
            (slope,),
            precision=decision.precision,
        )
    except Exception:  # something in the loss lives on what it holds constant
        return False
    return found.verdict == "agrees"


# ------------------------------------------------------------------------------------- products


def products_by_mode(setting: Setting) -> tuple[Check, dict[Mode, Leaves]]:
    """Multiply the Hessian with `v` by every exact mode that can."""
    name, means = "exact modes", "At least one exact mode can differentiate the loss twice."
    products: dict[Mode, Leaves] = {}
    refused: dict[str, list[str]] = {}
    for mode in EXACT_MODES:
        try:
            products[mode] = setting.problem.product(mode, setting.v)
        except Exception as error:  # noqa: PERF203
            refused.setdefault(first_line(error), []).append(mode)
    finding = "\n".join(
        [
            *([causes.listed(list(products))] if products else []),
            *(f"not {', not '.join(modes)}: {reason}" for reason, modes in refused.items()),
        ]
    )
    if products:
        return Check(name, True, finding, means), products
    cause = causes.all_modes_refuse(setting.evidence, list(refused))
    return Check(name, False, finding, means, causes=cause), products


def finite_products(setting: Setting, products: dict[Mode, Leaves]) -> Check:
    """Look for NaN and infinity in the products."""
    name, means = "product", "The product H v is finite."
    for mode, product in products.items():
        if not finite(product):
            at = places(setting.problem, product, _not_finite)
            finding = f"H v by {mode} is not finite at {causes.listed(at)}"
            cause = causes.not_finite(derivative_of=_first_nan(setting.problem, setting.v))
            return Check(name, False, finding, means, causes=cause)
    first = next(iter(products.values()))
    return Check(name, True, f"H v is finite, of norm {size(first):.3g}", means)


def agreement(setting: Setting, gradient: Leaves, products: dict[Mode, Leaves]) -> Check:
    """Compare several modes with each other."""
    name, means = "agreement of modes", "All exact modes give the same product."
    error = _largest_difference(products, _FLOOR * setting.evidence.eps * size(gradient))
    if error <= setting.rtol:
        finding = f"{_number(len(products))} modes {_apart(error, setting.rtol)}"
        return Check(name, True, finding, means, error, setting.rtol)
    if setting.double is not None:
        v = setting.like(setting.double, setting.v)
        try:
            finer = {mode: setting.double.product(mode, v) for mode in products}
            rest = _largest_difference(finer, 0.0)
        except Exception:
            rest = float("inf")
        if rest <= torch.finfo(torch.float64).eps ** 0.5:
            finding = f"modes differ by {error:.0e}, which is rounding: in float64 they differ by {_shown(rest)}"
            return Check(name, None, finding, means, error, setting.rtol)
    agreeing = right(setting, products)
    if setting.random and len(agreeing) == len(products):
        finding = (
            f"modes differ by {_shown(error)}: from one state they draw different random numbers, "
            "and each agrees with differences"
        )
        return Check(name, None, finding, means)
    cause = causes.modes_differ(setting.evidence, agreeing)
    finding = f"{causes.listed(list(products))} {_apart(error, setting.rtol)}"
    return Check(name, False, finding, means, error, setting.rtol, cause)


def _largest_difference(products: dict[Mode, Leaves], floor: float) -> float:
    first, *others = products.values()
    largest = 0.0
    for other in others:
        apart, scale = size(tree.sub(first, other)), max(size(first), size(other))
        if apart > floor:
            largest = max(largest, apart / scale)
    return largest


def right(setting: Setting, products: dict[Mode, Leaves]) -> list[Mode]:
    """Return the modes that differences of the gradient agree with, in double precision if it can be had."""
    problem, v = setting.problem, setting.v
    precision = Precision(setting.evidence.eps, setting.by_differences)
    if setting.double is not None:
        with suppress(Exception):
            wide = setting.like(setting.double, v)
            products = {mode: setting.double.product(mode, wide) for mode in products}
            problem, v, precision = setting.double, wide, setting.fine
    return [
        mode
        for mode, product in products.items()
        if _by_gradients(setting, problem, v, product, precision).verdict == "agrees"
    ]


def _by_gradients(
    setting: Setting, problem: Problem, v: Leaves, product: Leaves, precision: Precision
) -> Comparison:
    """Compare a product with differences of the gradient; of several, with those that are closest."""
    found = []
    for gradient in problem.gradients(random=setting.random):
        with suppress(Exception):  # torch.func does not take every loss that plain autograd takes
            found.append(compare(gradient, problem.leaves, v, product, precision=precision))
            if found[-1].verdict == "agrees":
                break
    return min(
        found,
        key=lambda comparison: (comparison.verdict != "agrees", comparison.error),
        default=NOTHING,
    )


def symmetry(setting: Setting, gradient: Leaves, mode: Mode, product: Leaves) -> Check:
    """Compare `u·Hv` with `v·Hu`."""
    name, means = "symmetry", "The product is that of a symmetric matrix, as a Hessian is."
    norm = size(product)
    # A random u is nearly orthogonal to Hv. This one is not, so that little of an asymmetry goes by.
    lean = size(setting.u) / norm if norm > 0 else 0.0
    u = tree.axpy(lean, product, setting.u)
    try:
        other = setting.problem.product(mode, u)
    except Exception as raised:
        return Check(name, False, f"H u raises {quoted(raised)}", means)
    left, right = float(tree.dot(u, product)), float(tree.dot(setting.v, other))
    scale = max(size(u) * norm, size(setting.v) * size(other))
    floor = _FLOOR * setting.evidence.eps * size(gradient) * size(u)
    apart = abs(left - right)
    error = apart / scale if apart > floor else 0.0
    compared = f"differ by {_shown(error)} of |u||Hv|, {setting.rtol:.0e} allowed"
    if error <= setting.rtol:
        finding = f"u·Hv and v·Hu {compared}"
        return Check(name, True, finding, means, error, setting.rtol)
    finding = f"u·Hv = {left:.6g} and v·Hu = {right:.6g} {compared}"
    cause = causes.asymmetric(setting.evidence)
    return Check(name, False, finding, means, error, setting.rtol, cause)


def second_order(setting: Setting, mode: Mode, product: Leaves, *, gradient_right: bool) -> Check:
    """Compare a product with differences of the gradient."""
    name, means = "product by differences", "H v is the derivative of the gradient along v."

    def trial(problem: Problem, precision: Precision) -> Comparison:
        v = setting.like(problem, setting.v)
        exact = product if problem is setting.problem else problem.product(mode, v)
        return _by_gradients(setting, problem, v, exact, precision)

    decision = setting.decide(trial)
    what = "differences of the gradient"
    if decision.comparison.verdict == "undecided":
        return _undecided(name, what, means, decision, setting)
    if decision.comparison.verdict == "agrees":
        lost = _lost_to_rounding(setting, decision, mode, product)
        if lost is None:
            return _agreed(name, what, means, decision, setting)
        cause = causes.of_product(
            setting.evidence, jumps=False, precision=True, gradient_right=gradient_right
        )
        finding = f"off by {lost:.2g} from the same product in float64, which agrees with {what}"
        return Check(name, False, finding, means, lost, setting.by_differences, cause)
    cause = causes.of_product(
        setting.evidence,
        jumps=decision.comparison.verdict == "jumps",
        precision=False,
        gradient_right=gradient_right,
    )
    return _off(name, what, means, decision, setting, cause)


def _lost_to_rounding(
    setting: Setting, decision: Decision, mode: Mode, product: Leaves
) -> float | None:
    """Return the error of a product in a coarse dtype, if it is more than a difference may be off."""
    if decision.problem is not setting.double or setting.random:
        return None
    v = setting.like(decision.problem, setting.v)
    exact = decision.problem.product(mode, v)
    error = size(tree.sub(setting.like(decision.problem, product), exact)) / (size(exact) or 1.0)
    return error if error > setting.by_differences else None


# ---------------------------------------------------------------------------------------- words


def _agreed(name: str, what: str, means: str, decision: Decision, setting: Setting) -> Check:
    error, manner = decision.comparison.error, decision.comparison.manner
    where = ", both in float64" if (decision.problem is setting.double) else ""
    how = manner or f"to {_shown(error)}, {decision.precision.rtol:.0e} allowed"
    finding = f"agrees with {what} {how}{where}"
    return Check(name, True, finding, means, error, decision.precision.rtol)


def _undecided(name: str, what: str, means: str, decision: Decision, setting: Setting) -> Check:
    comparison = decision.comparison
    finding = (
        f"{what} cannot decide: they scatter by {comparison.scatter:.0e}, "
        f"the best is off by {comparison.error:.0e}, {decision.precision.rtol:.0e} allowed"
    )
    cause = causes.undecided(setting.evidence, double=setting.double is not None)
    return Check(name, None, finding, means, comparison.error, decision.precision.rtol, cause)


def _off(
    name: str, what: str, means: str, decision: Decision, setting: Setting, cause: tuple[Cause, ...]
) -> Check:
    comparison = decision.comparison
    where = "in float64 too, " if decision.problem is setting.double else ""
    finding = f"{where}{what} grow without bound as their step shrinks"
    if comparison.verdict == "differs":
        off = f"off by {_shown(comparison.error)}, {decision.precision.rtol:.0e} allowed"
        finding = f"{where}{what} settle on another value, {off}"
    return Check(name, False, finding, means, comparison.error, decision.precision.rtol, cause)


def _apart(error: float, rtol: float) -> str:
    return f"differ by {_shown(error)}, {rtol:.0e} allowed"


def _shown(error: float) -> str:
    if error < 1e-16:
        return "< 1e-16"
    return f"{error:.0e}" if error < 1e-3 else f"{error:.2g}"


def _number(count: int) -> str:
    return {2: "two", 3: "three"}.get(count, str(count))


def _not_finite(leaf: Tensor) -> bool:
    return not bool(torch.isfinite(leaf).all())


def _first_nan(problem: Problem, v: Leaves | None) -> str:
    """Return the function whose derivative is the first to be NaN, as torch's anomaly mode names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.enable_grad(), torch.autograd.set_detect_anomaly(True):
                problem.differentiated(v)
        except RuntimeError as error:
            found = re.search(r"Function '(\w+?)(Backward\d*)?' returned nan", str(error))
            return found.group(1).lower() if found else ""
    return ""
