"""Fixtures every test may ask for, and the figures that pytest prints at its end."""

import os
from collections import Counter

# Before torch loads OpenMP, and for subprocesses: on a busy machine, threads that spin long take the time of those that work.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
# Subprocesses test what is installed, not the source tree they are started in.
os.environ["PYTHONSAFEPATH"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from under_test import GPU, KERNELS, force  # noqa: E402

from nf4lora import ops  # noqa: E402

if not GPU:
    # Before any Triton kernel is imported. What needs compiled kernels runs in processes without it.
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("nf4lora", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("nf4lora")

_FIGURES = pytest.StashKey[Counter]()


def pytest_configure(config):
    config.stash[_FIGURES] = Counter()


@pytest.fixture(scope="session")
def figures(pytestconfig) -> Counter:
    """What the session counted, by sentence: `figures["elements compared"] += n`. Printed at the end."""
    return pytestconfig.stash[_FIGURES]


def pytest_terminal_summary(terminalreporter, config):
    if counted := config.stash[_FIGURES]:
        terminalreporter.section("figures")
        for sentence in sorted(counted):
            terminalreporter.line(f"{sentence}: {counted[sentence]:,}")


class Forgetful(pytest.MonkeyPatch):
    """Ops prepare their calls, from code and tables as they were: what is changed here is seen by the next call."""

    def setattr(self, *args, **kwargs):
        super().setattr(*args, **kwargs)
        self.forget()

    def undo(self):
        super().undo()
        self.forget()

    @staticmethod
    def forget():
        for op in vars(ops).values():
            if isinstance(op, ops.Op):
                op.prepared.clear()


@pytest.fixture
def monkeypatch():
    patch = Forgetful()
    yield patch
    patch.undo()


@pytest.fixture(params=("cpu", "reference"))
def backend(request):
    """Forces one back end that has every op, each in turn."""
    with force(request.param):
        yield request.param


@pytest.fixture(params=(*KERNELS, "reference"))
def format_backend(request):
    """Forces one back end that quantizes and dequantizes, each in turn."""
    with force(request.param):
        yield request.param


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Forces the kernels of one back end that quantizes and dequantizes, each in turn."""
    with force(request.param):
        yield request.param


@pytest.fixture
def cpu():
    """Forces the host library."""
    with force("cpu"):
        yield


@pytest.fixture
def one_thread():
    """For many small products, where a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bnb():
    """bitsandbytes' functional API, without its torch.compile. (Its modules repack their weight in eval().)"""
    import bitsandbytes.functional

    with torch.compiler.set_stance("force_eager"):
        yield bitsandbytes.functional
