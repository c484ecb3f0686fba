"""What every test gets: fixed seeds, NumPy errors that raise, repeatable property tests, and a GPU."""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

from entrenar_gpu.errors import UserError

if TYPE_CHECKING:
    from entrenar_gpu.gpu.device import Device
    from entrenar_gpu.gpu.kernel import KernelCache

# Every run tries the same examples, so a failure is the change's and not the day's. Look for new ones with
# `pytest --hypothesis-profile=explore`. No deadline: the first example on a GPU pays for compiling its shader.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail the tests that need a GPU adapter where there is none"
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> "Device":
    """The device a user would get, so ENTRENAR_DEVICE chooses it. A test that asks for it is marked `gpu`."""
    from entrenar_gpu.gpu.device import Device

    try:
        return Device.open()
    except UserError as error:
        if request.config.getoption("--require-gpu"):
            pytest.fail(f"--require-gpu: {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernels(device: "Device") -> "KernelCache":
    """Compiled kernels of `device`, shared by all tests: compiling takes most of their time."""
    from entrenar_gpu.gpu.kernel import KernelCache

    return KernelCache(device)


@pytest.fixture(scope="session")
def limited_device(device: "Device") -> "Device":
    """The same adapter asked for nothing but WebGPU's guaranteed limits, and no optional feature."""
    return type(device).open(limited=True)


@pytest.fixture(scope="session")
def limited_kernels(limited_device: "Device") -> "KernelCache":
    from entrenar_gpu.gpu.kernel import KernelCache

    return KernelCache(limited_device)


@pytest.fixture(autouse=True)
def gpu_marker(request: pytest.FixtureRequest) -> None:
    """Holds tests marked `gpu` that open a device of their own to the same rule as those that ask for `device`."""
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("device")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def numpy_errors_raise() -> Iterator[None]:
    """Overflow, division by zero and invalid values are mistakes; underflow to zero is what softmax does."""
    with np.errstate(all="raise", under="ignore"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator that starts the same in every test."""
    return np.random.default_rng(0)
