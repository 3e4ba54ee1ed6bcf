"""An engine for the tests: the one that ``ZYGOTE_SOCKET`` names; its template is ``ZYGOTE_TEST_TEMPLATE``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import zygote_vm

TEMPLATE = os.environ.get("ZYGOTE_TEST_TEMPLATE", "python")


@pytest.fixture
def client() -> Iterator[zygote_vm.Client]:
    socket = os.environ.get("ZYGOTE_SOCKET")
    if not socket:
        pytest.skip("no engine: ZYGOTE_SOCKET is not set")
    with zygote_vm.Client(socket=socket) as client:
        yield client


@pytest.fixture
def box(client: zygote_vm.Client) -> Iterator[zygote_vm.Sandbox]:
    with client.create(TEMPLATE) as box:
        yield box


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
