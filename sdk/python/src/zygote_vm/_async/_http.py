"""Asking an engine: requests, streams of events, and what is asked again."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Union

import httpx

from .. import errors
from .._wait import async_sleep
from .._where import Where
from ..models import Event

NDJSON = "application/x-ndjson"
#: How long to wait for a connection, and for an answer to what needs nothing but words, in seconds.
CONNECT_MAX_S = 10.0
WORDS_MAX_S = 60.0
#: Longest pause before something is asked again, in seconds.
PAUSE_MAX_S = 10.0
#: Refused before anything has begun: asking again is always safe.
REFUSED = frozenset({"busy", "no_room", "limit_reached"})

Body = Union[bytes, AsyncIterator[bytes]]  # noqa: UP007


class AsyncHttp:
    """A pool of connections to one engine."""

    def __init__(
        self,
        where: Where,
        retries: int,
        verify: bool | str,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"authorization": f"Bearer {where.key}"} if where.key else {}
        if transport is None and where.socket:
            transport = httpx.AsyncHTTPTransport(uds=where.socket)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=where.url,
            headers=headers,
            transport=transport,
            verify=verify,
            limits=limits,
            # What a proxy of the environment would see is nobody's business.
            trust_env=not where.socket,
        )
        self._retries = retries

    async def aclose(self) -> None:
        await self._client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        limit: float | None = WORDS_MAX_S,
        is_safe: bool | None = None,
    ) -> Any:
        """An object for an object. What is safe is asked again when the connection broke off."""
        content = b"" if body is None else json.dumps(body).encode()
        answer = await self.send(
            method,
            path,
            content,
            params=params,
            headers={"content-type": "application/json", **(headers or {})},
            limit=limit,
            is_safe=method == "GET" if is_safe is None else is_safe,
        )
        return answer.json()

    async def send(
        self,
        method: str,
        path: str,
        content: bytes,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        limit: float | None = WORDS_MAX_S,
        is_safe: bool = False,
    ) -> httpx.Response:
        """A whole answer for a whole body."""
        tried = 0
        while True:
            try:
                answer = await self._client.request(
                    method,
                    path,
                    content=content,
                    params=params,
                    headers=headers,
                    timeout=httpx.Timeout(limit, connect=CONNECT_MAX_S),
                )
                if answer.is_success:
                    return answer
                failure = told(answer)
            except httpx.ConnectError as error:
                failure, can_again = unreachable(error), True
            except httpx.TransportError as error:
                failure, can_again = unreachable(error), is_safe
            else:
                can_again = failure.code in REFUSED and failure.retry_after is not None
            tried += 1
            if not can_again or tried > self._retries:
                raise failure
            await async_sleep(min(failure.retry_after or 0.1 * 2**tried, PAUSE_MAX_S))

    @asynccontextmanager
    async def bytes(
        self, method: str, path: str, *, params: Mapping[str, Any], body: Body | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """An answer's bytes, as they come."""
        headers = {"content-type": "application/octet-stream"}
        async with self._stream(method, path, body, headers, params, None) as answer:
            yield answer.aiter_bytes()

    async def events(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        limit: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """What happens, as the engine tells it; ``error`` events are raised. Leaving it gives the request up."""
        content = None if body is None else json.dumps(body).encode()
        both = {"accept": NDJSON, "content-type": "application/json", **(headers or {})}
        async with self._stream(method, path, content, both, params, limit) as answer:
            async for line in answer.aiter_lines():
                if not line:
                    continue
                data = json.loads(line)
                if data.get("type") == "error" or set(data) == {"error"}:
                    raise errors.of(data, status=answer.status_code)
                yield Event(type=data.pop("type", ""), data=data)

    @asynccontextmanager
    async def _stream(
        self,
        method: str,
        path: str,
        body: Body | None,
        headers: Mapping[str, str],
        params: Mapping[str, Any] | None,
        limit: float | None,
    ) -> AsyncIterator[httpx.Response]:
        try:
            async with self._client.stream(
                method,
                path,
                content=body,
                headers=headers,
                params=params,
                timeout=httpx.Timeout(limit, connect=CONNECT_MAX_S),
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise told(answer)
                yield answer
        except httpx.TransportError as error:
            raise unreachable(error) from error


def told(answer: httpx.Response) -> errors.ZygoteError:
    try:
        body = answer.json()
    except ValueError:
        body = None
    return errors.of(body, status=answer.status_code)


def unreachable(error: httpx.TransportError) -> errors.ConnectionFailed:
    return errors.ConnectionFailed(
        "the engine does not answer, or the connection broke off",
        code="engine_unreachable",
        cause=str(error) or type(error).__name__,
        remedy="see whether it is there: zygote status",
    )
