"""What stands before the server: which paths there are, who may ask, and how much at once. An ASGI application."""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # no key is asked for
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", *OPEN)


class Guard:
    """Passes on what may be asked. Loading and unloading models over HTTP, which the application offers, may not.

    `api_key`: clients send it as "Authorization: Bearer KEY"; None: anyone may ask. `max_bytes`: of a request's body.
    """

    def __init__(self, app: App, api_key: str | None = None, max_bytes: int = 2_000_000):
        self.app, self.api_key, self.max_bytes = app, api_key, max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; anything that is none (the start and end of the application) is passed on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in PATHS:
            await _refuse(send, 404, f"there is no {scope['path']} here: {', '.join(PATHS)}")
        elif scope["path"] not in OPEN and not self._may_ask(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "wrong or missing API key")
        elif (body := await self._body(receive)) is None:
            await _refuse(send, 413, f"the request has more than {self.max_bytes} bytes")
        else:
            await self.app(scope, _again(body, receive), send)

    def _may_ask(self, authorization: bytes) -> bool:
        return self.api_key is None or hmac.compare_digest(authorization, f"Bearer {self.api_key}".encode())

    async def _body(self, receive: Receive) -> bytes | None:
        """All of a request's body; None: it is too long. Whatever its header says, what comes is counted."""
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message["type"] == "http.request" and message.get("more_body", False)
            if len(body) > self.max_bytes:
                return None
        return body


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then what else the client does, such as leaving."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return left.pop() if left else await receive()

    return next_message


async def _refuse(send: Send, status: int, message: str) -> None:
    """An error as the API's clients read it."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
