"""What all tests share: one thread, reproducible property tests, the marker of peer packages."""

import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# torch loads its forward rules at the first jvp of a process, with deprecation warnings of its own.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("torch._decomp.decompositions_for_jvp")

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("reproducible")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that ask another package for the answer."""
    config.addinivalue_line("markers", "peers: compares with another package, if it is installed")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from one random state and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240229)
        yield
