"""What `mule serve` shows when it listens: the address, the token's file, and how to call it."""

from __future__ import annotations

from typing import Any

from mule.cli import render
from mule.cli.perform import print_json

_CHAT = '"messages": [{"role": "user", "content": "Hello"}]'
_TEXT = '"prompt": "Once upon a time"'


def show_started(started: dict[str, Any], *, as_json: bool) -> None:
    """Lines to copy; with `as_json` one object on stdout, as soon as requests are taken."""
    if as_json:
        print_json(started)
        return
    results, _ = render.consoles(as_json)
    for line in started_lines(started):
        render.print_line(results, line)


def started_lines(started: dict[str, Any]) -> list[str]:
    """The same as text: a curl command (bash or zsh) and the `openai` client."""
    url, file, model = started["url"], started["token_file"], started["models"][0]
    chats = model in started["chat"]
    route = "chat/completions" if chats else "completions"
    given = _CHAT if chats else _TEXT
    call = "chat.completions" if chats else "completions"
    text = "message.content" if chats else "text"
    keyword = given[1:].replace('": ', "=", 1)
    return [
        f"serving {', '.join(started['models'])} at {url}",
        f"the token every caller needs is in {file}",
        "",
        # The token goes through a pipe: other users of the machine can read command lines.
        f'curl {url}/{route} -H @<(echo "Authorization: Bearer $(cat {file})") \\',
        f"  -H 'Content-Type: application/json' -d '{{\"model\": \"{model}\", {given}}}'",
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}", api_key=open("{file}").read().strip())',
        f'print(client.{call}.create(model="{model}", {keyword}).choices[0].{text})',
        "",
        "Ctrl-C stops it.",
    ]
