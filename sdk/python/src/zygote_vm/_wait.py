"""Waiting, in both worlds."""

from __future__ import annotations

import time

import anyio


async def async_sleep(seconds: float) -> None:
    await anyio.sleep(seconds)


def sleep(seconds: float) -> None:
    time.sleep(seconds)
