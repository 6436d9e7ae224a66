"""Functions whose forward rule in torch is right when it is differentiated forward, by a sweep of torch's databases.

Written by `make proven`; the tests prove each again.
"""

__all__ = ["NAMES"]

NAMES: tuple[str, ...] = ()
