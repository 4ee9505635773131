"""`pytest --hard` runs the promises' second, larger figures (spec/promises.md); they take minutes to hours."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--hard", action="store_true", help="run the long versions of the promised tests")


@pytest.fixture
def hard(request) -> bool:
    return request.config.getoption("--hard")


@pytest.fixture(scope="session", autouse=True)
def interpreting(request):
    """Processes that run Triton's kernels in its interpreter, by test. They take a minute of one core each, and begin beside
    the first of all tests."""
    running = {}
    for item in request.session.items:
        words = item.get_closest_marker("interpreted")
        if words and "TRITON_INTERPRET" not in os.environ and importlib.util.find_spec("triton"):
            running[item.nodeid] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-x", "-k", words.args[0], item.path], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    yield running
    for process in running.values():
        if process.poll() is None:  # nobody waited for it
            process.kill()
            process.communicate()


@pytest.fixture
def interpreted(request, interpreting) -> tuple[int, str]:
    """Of the process for this test: its exit status and the end of what it said."""
    process = interpreting[request.node.nodeid]
    said, _ = process.communicate()
    return process.returncode, said[-5000:]


@pytest.fixture(scope="session")
def fork_server():
    """The multiprocessing context of a server that holds torch ready: a process starts in milliseconds, not in seconds."""
    context, here = multiprocessing.get_context("forkserver"), Path(__file__).parent
    context.set_forkserver_preload(["test_resume", "torch._dynamo", "torch.distributed.fsdp",  # as optimisers and --shard do
                                    "torch.distributed.checkpoint"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(here), str(here.parent))))
        forkserver.ensure_running()
    return context
