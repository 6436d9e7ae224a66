"""A self-check of the user's own loss at the user's own parameters.

`verify` evaluates, differentiates and compares; `Verification` holds what came out of each check and prints it.
"""

from secorder_func.verify._result import Cause, Check, Verification
from secorder_func.verify._verify import verify

__all__ = ["Cause", "Check", "Verification", "verify"]
