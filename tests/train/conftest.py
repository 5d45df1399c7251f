"""Tests of small networks, on one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def small_networks(one_thread):
    """All tests here are of small networks."""
