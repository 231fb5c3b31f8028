"""Samples from a served model, through the chat completions of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from sse_eval.folder import EvaluationError
from sse_eval.types import FinishReason, Message, SampleOutput, SampleRequest

_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
_CONTEXT_KEYS = ("max_model_len", "context_length", "max_context_length")


class Endpoint:
    """A `Generator` over HTTP: `concurrency` requests at a time, each sample its own request.

    Args:
        url: base address, with or without /v1, e.g. http://localhost:8000/v1.
        model: the served model's name; None takes the only one served.
        api_key: by default OPENAI_API_KEY of the environment, if it is there.
        timeout: seconds one answer may take.
        retries: attempts after the first for answers that say "later" (429, 5xx) or do not come.

    Raises EvaluationError if the endpoint does not answer, wants another key, or does not serve
    the model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 1800.0,
        retries: int = 5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise EvaluationError(
                f"the endpoint must be an http:// or https:// address, not {url!r}"
            )
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.url = url.rstrip("/")
        self.url += "" if self.url.rsplit("/", 1)[-1].startswith("v") else "/v1"
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self._key = os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key
        served = self._served()
        if model is None and len(served) != 1:
            raise EvaluationError(f"{self.url} serves {sorted(served)}: name the model")
        self.model = model or next(iter(served))
        if served and self.model not in served:
            raise EvaluationError(f"{self.url} does not serve {self.model!r} but {sorted(served)}")
        self.max_context: int | None = next(
            (
                served[self.model][key]
                for key in _CONTEXT_KEYS
                if served.get(self.model, {}).get(key)
            ),
            None,
        )

    def render(self, messages: Sequence[Message]) -> str:
        """The messages as JSON: the chat template is the server's."""
        return json.dumps([dict(message) for message in messages], ensure_ascii=False)

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[SampleOutput]:
        """Yield answers as they come. The first request that cannot be answered ends it with an
        EvaluationError that names the sample; closing the iterator stops asking."""
        waiting: queue.SimpleQueue[SampleRequest] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)
        answers: queue.SimpleQueue[SampleOutput | Exception] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    request = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put(self._answer(request, stop))
                except Exception as error:  # carried to the thread that reads
                    answers.put(error)
                    return

        for _ in range(min(self.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in requests:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            stop.set()

    def _answer(self, request: SampleRequest, stop: threading.Event) -> SampleOutput:
        started = time.monotonic()
        what = f"sample {request.sample} of {request.id!r}"
        body = self._ask(
            "/chat/completions",
            {
                "model": self.model,
                "messages": [dict(message) for message in request.messages],
                "seed": request.seed,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
            },
            what=what,
            stop=stop,
        )
        try:
            choice = body["choices"][0]
            tokens = int(body["usage"]["completion_tokens"])
            text = _text(choice["message"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{self.url} answered {what} without choices[0].message and "
                f"usage.completion_tokens: {json.dumps(body)[:300]}"
            ) from error
        finish: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
        return SampleOutput(
            id=request.id,
            sample=request.sample,
            completion=text,
            tokens=tokens,
            finish_reason=finish,
            prompt=self.render(request.messages),
            seconds=time.monotonic() - started,
        )

    def _served(self) -> dict[str, dict[str, Any]]:
        """Models by name; {} where the server has no list."""
        try:
            listed = self._ask("/models", None, what="the list of models", patience=30.0)
        except _Unlisted:
            return {}
        return {model["id"]: model for model in listed.get("data", []) if "id" in model}

    def _ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        *,
        what: str,
        stop: threading.Event | None = None,
        patience: float | None = None,
    ) -> dict[str, Any]:
        """One JSON answer, asked for again with growing pauses while the server says "later"."""
        for attempt in range(self.retries + 1):
            pause = min(60.0, 0.5 * 2**attempt)
            try:
                with urllib.request.urlopen(
                    self._request(path, body), timeout=patience or self.timeout
                ) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode(errors="replace").strip()
                trouble = f"HTTP {error.code}: {said or error.reason}"
                if body is None and error.code in (404, 405):
                    raise _Unlisted(trouble) from error
                if error.code in (401, 403):
                    raise EvaluationError(
                        f"{self.url} refuses the key (set OPENAI_API_KEY): {trouble}"
                    ) from error
                if error.code not in _AGAIN:
                    raise EvaluationError(f"{self.url} refuses {what}: {trouble}") from error
                pause = _retry_after(error, pause)
            except (OSError, ValueError) as error:  # no connection, a time-out, no JSON
                trouble = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries and (stop or threading.Event()).wait(pause):
                break
        raise EvaluationError(
            f"{self.url} did not answer {what} in {self.retries + 1} attempts: {trouble}"
        )

    def _request(self, path: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.url + path, data=data, headers=headers)


class _Unlisted(Exception):
    """The server has no list of models."""


def _text(message: dict[str, Any]) -> str:
    """The whole answer; a server that parts the thinking from it gets its tags back."""
    thinking = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content")
    if not thinking:
        return content or ""
    return f"<think>{thinking}" + ("" if content is None else f"</think>{content}")


def _retry_after(error: urllib.error.HTTPError, otherwise: float) -> float:
    try:
        return min(120.0, max(0.0, float(error.headers.get("Retry-After", ""))))
    except ValueError:
        return otherwise
