"""Text to token ids and back, and chats to the text a model was taught."""

from mule.tokenizer.core import Tokenizer
from mule.tokenizer.stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer"]
