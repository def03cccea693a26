"""`compress serve`: the OpenAI-compatible server of transformers, with one model in it that was loaded here.

transformers' handlers answer; what is ours is the model they are given, limits, and errors of requests said as such.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from compress.errors import RunError
from compress.serve_guard import App, Guard

CUT = 130  # exit code of a server that did not finish what was begun


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens and what it lets through."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_model_len: int | None = None  # tokens of a prompt and its answer; None: the model's own
    max_requests: int = 64  # at once, waiting ones with them
    max_bytes: int = 2_000_000  # of one request


class _OneModel(ModelManager):
    """transformers' store of models with one in it, which no request replaces or unloads."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        super().__init__(device=str(model.device), model_timeout=-1)
        self.force_model, self._model, self._tokenizer = name, model, tokenizer

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return self._model, self._tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model alone. transformers lists its cache of downloads, and fails where there is none."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "compress"}]


class _Limited(GenerateManager):
    """Generation that refuses what does not fit."""

    def __init__(self, max_model_len: int):
        super().__init__()
        self.max_model_len = max_model_len

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **rest: Any) -> Any:
        """As transformers does. Raises HTTPException (400) for a prompt that is too long."""
        self._fit(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **rest)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **rest: Any
    ) -> Any:
        """As transformers does. Raises HTTPException (400) for a prompt that is too long."""
        self._fit(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **rest)

    def _fit(self, model: Any, inputs: Any, gen_config: Any) -> None:
        """Refuse a prompt that leaves no room; lower how many tokens may follow to those that have room."""
        length = inputs["input_ids"].shape[-1]
        if not 0 < length < self.max_model_len:
            raise _bad_request(
                f"the prompt has {length} tokens; 1 to {self.max_model_len - 1} leave room for an answer"
            )
        if int(inputs["input_ids"].max()) >= model.get_input_embeddings().num_embeddings:
            raise _bad_request("the tokenizer gave a token that the model has no embedding of")
        if gen_config.max_new_tokens is None or gen_config.max_new_tokens > self.max_model_len - length:
            gen_config.max_new_tokens = self.max_model_len - length
        if gen_config.max_new_tokens < 1:
            raise _bad_request("max_tokens is below 1")


class _State(GenerationState):
    """One manager of generation for the one model."""

    def __init__(self, max_model_len: int):
        super().__init__()
        self._manager = _Limited(max_model_len)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The manager of the one model."""
        return self._manager


def _bad_request(message: str) -> Exception:
    from fastapi import HTTPException

    return HTTPException(status_code=400, detail=message)


@contextmanager
def _as_bad_request() -> Iterator[None]:
    """Say of a request that makes no sense that it does not; transformers would answer 500."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise _bad_request(f"the request makes no sense: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):  # a chat template that does not take these messages
            raise _bad_request(f"the chat template refuses these messages: {error}") from error
        raise


class _Chat(ChatCompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """One request of /v1/chat/completions."""
        with _as_bad_request():
            return await super().handle_request(body, request_id)


class _Completions(CompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """One request of /v1/completions."""
        with _as_bad_request():
            return await super().handle_request(body, request_id)


class _Responses(ResponseHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """One request of /v1/responses. transformers streams unless told not to; OpenAI's API only where told to."""
        body = {"stream": False, **body}
        with _as_bad_request():
            return await super().handle_request(body, request_id)


def build_app(name: str, model: Any, tokenizer: Any, options: ServeOptions) -> App:
    """The application that serves `model` under `name`."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    state = _State(min(own, options.max_model_len or own))
    models = _OneModel(name, model, tokenizer)
    app = build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completions(models, state),
        response_handler=_Responses(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    return Guard(app, options.api_key, options.max_bytes)


class _Server(uvicorn.Server):
    """uvicorn's, whose second signal does not wait."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets it finish what was begun. At the second the process is over: threads may be in torch."""
        if self.should_exit:
            os._exit(CUT)
        super().handle_exit(sig, frame)


def serve(name: str, model: Any, tokenizer: Any, options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the answers begun and return; at a second one end the process.

    A thread may still be at an answer that nobody waits for. Raises RunError if the port cannot be had.
    """
    config = uvicorn.Config(
        build_app(name, model, tokenizer, options),
        host=options.host,
        port=options.port,
        log_level="warning",
        limit_concurrency=options.max_requests,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _Server(config).run()
    except KeyboardInterrupt:  # it raises the signal that stopped it once more when all is done
        return
    except SystemExit as error:  # uvicorn has said which address is in use
        raise RunError(f"cannot listen on {options.host}:{options.port}: choose another --port") from error
