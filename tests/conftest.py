"""`pytest --hard` runs the promises' second, larger figures (spec/promises.md); they take minutes to hours."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--hard", action="store_true", help="run the long versions of the promised tests")


@pytest.fixture
def hard(request) -> bool:
    return request.config.getoption("--hard")
