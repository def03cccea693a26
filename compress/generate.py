"""`compress generate`: text after a prompt, as it comes, and how fast it came."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compress.calib.model_files import first_line
from compress.errors import NO_MEMORY, InputError


@dataclass(frozen=True)
class GenerateOptions:
    """What is asked of a generation."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the most likely token each time
    seed: int = 0
    chat: bool = False  # the prompt is a user's message, put into the model's chat template


@dataclass(frozen=True)
class Generated:
    """A text and its figures."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float  # until the first token was there
    decode_seconds: float  # for the others

    @property
    def figures(self) -> dict[str, float | int]:
        """Tokens and tokens a second; no rate of decoding for a single token."""
        rates = {"prompt_tokens_per_second": self.prompt_tokens / self.prompt_seconds}
        if self.new_tokens > 1:
            rates["decode_tokens_per_second"] = (self.new_tokens - 1) / self.decode_seconds
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, **rates}


class _Stream:
    """What transformers hands each token to. A character may take several tokens: it is passed on once it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.said = ""
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then a token at a time."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._say(text)

    def end(self) -> None:
        """Pass on what is left, whole or not."""
        self._say(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _say(self, text: str) -> None:
        self.on_text(text[len(self.said) :])
        self.said = text


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompt: str, options: GenerateOptions, on_text: Callable[[str], None] = lambda _: None
) -> Generated:
    """Generate after `prompt`; `on_text` gets each piece as it comes.

    Raises InputError for an empty prompt, one that does not fit the model, --chat without a chat template, and where
    tokenizer or generation_config.json do not go with the model.
    """
    ids = _prompt_ids(tokenizer, prompt, options.chat)
    if (top := int(ids.max())) >= (rows := model.get_input_embeddings().num_embeddings):
        raise InputError(
            f"{model.name_or_path}: its tokenizer gave token {top} of {rows} embeddings: restore its files"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + options.max_new_tokens > limit:
        raise InputError(
            f"a prompt of {ids.shape[1]} tokens and {options.max_new_tokens} more do not fit the model's {limit}: shorten "
            "the prompt or lower --max-new-tokens"
        )
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    stream = _Stream(tokenizer, on_text)
    started = time.perf_counter()
    ids = ids.to(model.device)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            streamer=stream,
            **sampling,
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, RuntimeError) as error:
        if NO_MEMORY.search(str(error)):
            raise
        model(input_ids=ids)  # which raises as well, unless it is the settings
        reason = f"transformers does not generate as its generation_config.json says ({first_line(error)})"
        raise InputError(f"{model.name_or_path}: {reason}: restore that file, or take it away") from error
    decoding = stream.times[-1] - stream.times[0]
    return Generated(stream.said, ids.shape[1], len(stream.tokens), stream.times[0] - started, decoding)


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids [1, tokens] of a prompt."""
    if not chat:
        ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise InputError("this model has no chat template: leave --chat out")
    else:
        messages = [{"role": "user", "content": prompt}]
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        except Exception as error:  # a template, which runs in jinja's sandbox, raises whatever its expressions do
            reason = f"the model's chat template does not take this message ({first_line(error)})"
            raise InputError(f"{reason}: leave --chat out") from error
    if not ids.shape[1]:
        raise InputError("the prompt has no tokens: write something")
    return ids
