"""The rules of a competition: when it closes, which queries count, and who may submit how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from retrieval.errors import InputError
from retrieval.server.answer_key import read_pairs
from retrieval.server.group_names import folded


@dataclass(frozen=True)
class Rules:
    """How a competition is run."""

    closes_at: datetime | None = None
    public: tuple[str, ...] | None = None  # the queries that count until it closes; None: all
    hide_scores: bool = False
    tokens: dict[str, str] | None = None  # group → token; None: anybody may submit
    per_minute: int = 60  # submissions of a group
    per_address: int | None = None  # submissions of an address in a minute
    behind_proxy: str | None = None  # the proxy's address: its X-Forwarded-For tells who submits
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def closed(self) -> bool:
        """Whether the competition is over."""
        return self.closes_at is not None and self.now() >= self.closes_at

    @property
    def partly(self) -> bool:
        """Whether only the public queries count now."""
        return self.public is not None and not self.closed


def moment(when: datetime | str) -> str:
    """Return a moment in this machine's time zone, for people to read."""
    taken = datetime.fromisoformat(when) if isinstance(when, str) else when
    return taken.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def read_tokens(table: Path) -> dict[str, str]:
    """Read the token of each group from a CSV table of lines `group,token`. Raises InputError for others."""
    tokens: dict[str, str] = {}
    groups: set[str] = set()
    for where, (group, token) in read_pairs(table, "group", "token"):
        if folded(group) in groups:
            raise InputError(f"{where}: {group} has a token on an earlier line")
        if token in tokens.values():
            raise InputError(f"{where}: the token of {group} is another group's on an earlier line")
        groups.add(folded(group))
        if not token.isascii() or not token.isprintable():  # no header could hold it
            raise InputError(f"{where}: the token of {group} is not of ASCII letters, digits and signs")
        tokens[group] = token
    return tokens
