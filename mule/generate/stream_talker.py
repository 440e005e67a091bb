"""A decoder that answers one request at a time in a thread: for what the batching engine is not."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from mule.generate.answer import AnswerText
from mule.generate.engine import stream
from mule.generate.request import Deliver, Ended, Message, Request
from mule.generate.sampler import Drawn
from mule.models.decoder import Decoder
from mule.tokenizer import StreamDecoder, Tokenizer


class StreamTalker:
    """A Talker of mule.generate.conversation on a decoder and its tokenizer."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, chat: bool) -> None:
        self._model, self._tokenizer, self.chat = model, tokenizer, chat
        self.context_tokens = model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with what the model expects before it."""
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, ready to be answered."""
        return self._tokenizer.encode_prompt(list(messages))

    def submit(self, request: Request, deliver: Deliver) -> StreamJob:
        """Answer it in a thread of its own."""
        job = StreamJob(self, request, deliver)
        job.start()
        return job

    def close(self) -> None:
        """Nothing to release."""

    def answer(self, request: Request, deliver: Deliver, cancelled: threading.Event) -> None:
        """Deliver the events of one answer, the last of them an Ended whatever happens."""
        text = AnswerText(
            request,
            StreamDecoder(self._tokenizer),
            stop_ids=frozenset(self._tokenizer.stop_ids),
            context_tokens=self.context_tokens,
        )
        last = text.end("failed", "the model failed while it answered")
        try:
            for token in stream(
                self._model,
                request.ids,
                max_tokens=request.max_tokens + 1,  # AnswerText counts them
                stop_ids=(),
                sampling=request.sampling,
                vocab_size=self._tokenizer.vocab_size,
            ):
                *tokens, event = text.push(Drawn(token))
                for shown in tokens:
                    deliver(shown)
                if isinstance(event, Ended):
                    last = event
                    return
                deliver(event)
                if cancelled.is_set():
                    last = text.end("cancelled")
                    return
            last = text.end("context")
        finally:
            deliver(last)


class StreamJob(threading.Thread):
    """A request on its way."""

    def __init__(self, talker: StreamTalker, request: Request, deliver: Deliver) -> None:
        super().__init__(daemon=True)
        self._talker, self._request, self._deliver = talker, request, deliver
        self._cancelled = threading.Event()

    def run(self) -> None:
        self._talker.answer(self._request, self._deliver, self._cancelled)

    def cancel(self) -> None:
        """Stop after the next token."""
        self._cancelled.set()
