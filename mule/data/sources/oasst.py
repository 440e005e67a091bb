"""OpenAssistant's trees of messages, as flat messages with a parent_id or as nested trees.

`threads=best` takes one path of each tree: at every message the reply of the lowest rank, where
replies without a rank come last and the first in the file wins a tie. `threads=all` takes every
path. A path is cut back to its last assistant message, and none is given twice. A message that is
deleted, or that reviewers rejected (`review_result` false: spam, another language), is left out
with all that answers it, and so is a message whose parent is not in the file.
A conversation's line is that of its last message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message, Notice
from mule.data.sources.message import ROLE_NAMES
from mule.data.sources.options import ReadOptions
from mule.data.sources.row import Row, type_name
from mule.data.sources.turns import conversation
from mule.errors import DataError


@dataclass(slots=True)
class _Node:
    """A message with its replies, in the order of the file."""

    message: Message
    rank: float | None
    row: Row
    deleted: bool
    rejected: bool
    parent: str | None = None
    replies: list[_Node] = field(default_factory=list)

    @property
    def is_out(self) -> bool:
        return self.deleted or self.rejected


class _Trees:
    """Collects the trees of a file; flat messages wait for the end, since parents may come late."""

    def __init__(self, file: str, options: ReadOptions) -> None:
        self._file, self._best = file, options.threads == "best"
        self._flat: dict[str, _Node] = {}
        self._num_deleted = self._num_rejected = self._num_below = self._num_unanswered = 0

    def add(self, row: Row) -> Iterator[Conversation | DataError]:
        if row.value.get("message_tree_id") is not None and "prompt" in row.value:
            yield from self._threads(_nested(row, row.value["prompt"], "prompt"))
            return
        name = row.text("message_id")
        if name in self._flat:
            row.fail(f'the "message_id" {name} was given before', "remove one of the two rows")
        node = _node(row, row.value, "this message")
        if row.value.get("parent_id") is not None:
            node.parent = row.text("parent_id")
        node.row = Row({}, row.file, row.line)  # its words are in the message
        self._flat[name] = node

    def finish(self) -> Iterator[Conversation | DataError | Notice]:
        orphans = []
        for node in self._flat.values():
            if node.parent is None:
                continue
            if parent := self._flat.get(node.parent):
                parent.replies.append(node)
            else:
                orphans.append(node)
        num_in_trees = 0
        for node in self._flat.values():
            if node.parent is None:
                num_in_trees += sum(1 for _ in _all_below(node))
                yield from self._threads(node)
        yield from self._outside(orphans, num_in_trees)
        yield from self._told()

    def _threads(self, root: _Node) -> Iterator[Conversation | DataError]:
        self._count_left_out(root)
        paths = _answered_paths(root, best=self._best)
        if not paths:
            self._num_unanswered += 1
        for path in paths:
            try:
                yield conversation(path[-1].row, [node.message for node in path])
            except DataError as error:
                yield error

    def _count_left_out(self, root: _Node) -> None:
        waiting = [(root, False)]
        while waiting:
            node, is_below = waiting.pop()
            self._num_deleted += node.deleted
            self._num_rejected += node.rejected and not node.deleted
            self._num_below += is_below and not node.is_out
            waiting += [(reply, is_below or node.is_out) for reply in node.replies]

    def _outside(self, orphans: list[_Node], num_in_trees: int) -> Iterator[Notice]:
        """The messages that no root leads to."""
        num_hanging = sum(1 for orphan in orphans for _ in _all_below(orphan))
        if orphans:
            parents = {orphan.parent for orphan in orphans}
            yield Notice(
                self._file,
                orphans[0].row.line,
                f"{num_hanging:,} messages left out: they hang on {len(parents):,} parents "
                "that are not in the file",
                lost=True,
            )
        if num_circling := len(self._flat) - num_hanging - num_in_trees:
            text = f"{num_circling:,} messages left out: their parents go round in a circle"
            yield Notice(self._file, None, text, lost=True)

    def _told(self) -> Iterator[Notice]:
        for count, what in (
            (self._num_deleted, "deleted messages"),
            (self._num_rejected, "messages that reviewers rejected"),
            (self._num_below, "replies to these"),
            (self._num_unanswered, "trees without an answer"),
        ):
            if count:
                yield Notice(self._file, None, f"{count:,} {what} left out", lost=True)


@dataclass(frozen=True, slots=True)
class _Step:
    """A message on its way down, and the step before it."""

    node: _Node
    before: _Step | None

    def path(self) -> list[_Node]:
        nodes: list[_Node] = []
        step: _Step | None = self
        while step is not None:
            nodes.append(step.node)
            step = step.before
        return nodes[::-1]


def _answered_paths(root: _Node, *, best: bool) -> list[list[_Node]]:
    """The paths from the root, cut back to an assistant message; of a tree with none, no path."""
    paths: dict[int, list[_Node]] = {}  # by its last message, so that none comes twice
    waiting: list[_Step] = [] if root.is_out else [_Step(root, None)]
    while waiting:
        step = waiting.pop()
        replies = [reply for reply in step.node.replies if not reply.is_out]
        if best and replies:
            replies = [min(replies, key=_rank)]
        waiting += [_Step(reply, step) for reply in reversed(replies)]
        path = [] if replies else step.path()
        while path and path[-1].message.role != "assistant":
            path.pop()
        if path:
            paths.setdefault(id(path[-1]), path)
    return list(paths.values())


def _rank(node: _Node) -> tuple[bool, float]:
    return (node.rank is None, node.rank or 0)


def _all_below(root: _Node) -> Iterator[_Node]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.replies


def _nested(row: Row, value: Any, name: str) -> _Node:
    """The tree under `value`, built without recursion: a long chat is a deep tree."""
    root = _node(row, value, name)
    waiting = [(root, value)]
    while waiting:
        node, value = waiting.pop()
        replies = value.get("replies") or []
        if not isinstance(replies, list):
            row.fail(f'"replies" is {type_name(replies)}, not a list', "give a list of messages")
        for reply in replies:
            node.replies.append(_node(row, reply, "a reply"))
            waiting.append((node.replies[-1], reply))
    return root


def _node(row: Row, value: Any, name: str) -> _Node:
    if not isinstance(value, dict):
        row.fail(f"{name} is {type_name(value)}, not an object", "export the trees again")
    role = value.get("role")
    if role not in ("prompter", "assistant"):
        row.fail(f"{name} has the unknown role {role!r}", "use prompter or assistant")
    rank = value.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float))):
        row.fail(f'"rank" of {name} is {type_name(rank)}, not a number', "give a number or null")
    text = row.checked_text(value.get("text"), f'"text" of {name}')
    flags = {"deleted": False, "review_result": True}
    for key, default in flags.items():
        flags[key] = default if value.get(key) is None else value[key]
        if not isinstance(flags[key], bool):
            row.fail(f'"{key}" of {name} is {type_name(flags[key])}', "give true or false")
    message = Message(ROLE_NAMES[role], text)
    return _Node(message, rank, row, flags["deleted"], not flags["review_result"])


FORMAT = Format(
    "oasst",
    "conversation",
    "OpenAssistant's messages with a parent_id, or its nested trees",
    keys=(("message_id", "role", "text"), ("message_tree_id", "prompt")),
    facts=(
        "message_id",
        "role",
        "message_tree_id",
        "parent_id",
        "rank",
        "deleted",
        "review_result",
    ),
    collect=_Trees,
)
