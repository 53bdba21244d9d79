"""``cache_explain``: why the cache did not have more of a prompt, in words.

The engine says which tokens it missed and where an earlier prompt is another one
(engine/explain.py). Here the place becomes a message and a few words of both, and what has changed
there gets a name where it has one: a date, the tools, thoughts that the client did not send back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headstart.engine.process.messages import Difference, Explanation, Missed
from headstart.server.text.drift import drift
from headstart.server.text.layout import Layout, common_prefix
from headstart.server.text.templates import Message
from headstart.server.text.tokenizer import Tokenizer

SHARED_CHARS, SHOWN_CHARS = 40, 60
"""Of a text before the place where two prompts differ, and of each behind it."""

REJOINING = 6
"""Tokens in a row that a prompt and an earlier one have in common behind the place where they
differ, if it is the same prompt but for a change."""

OPENERS = ("<|channel|>analysis",)
"""What thoughts begin with, beside the marks that are read."""

Named = Literal[
    "template_drift",
    "template_changed",
    "tools_changed",
    "reasoning_dropped",
    "text_removed",
    "text_inserted",
    "text_changed",
    "never_seen",
    "not_seen_under_salt",
]
"""What the cause ``differs`` is called, by what is different."""

MINOR = ("last_token", "below_page")
"""What is missed of a prompt that is all in the cache."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A prompt that is explained. ``messages``: of a chat; ``layout``: where that could be told.
    ``openers``: what thoughts begin with. ``salted``: its KV is kept apart by a salt or a key."""

    token_ids: Sequence[int]
    messages: Sequence[Message] = ()
    layout: Layout | None = None
    openers: Sequence[str] = ()
    salted: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where two prompts part: the text before it, and of either what is behind it. ``message``: its
    number, if it is in one."""

    shared: str
    here: str
    earlier: str
    message: int | None
    tools: bool

    @property
    def beginnings(self) -> tuple[str, str, str]:
        """As much of the texts as is shown."""
        return self.shared[-SHARED_CHARS:], self.here[:SHOWN_CHARS], self.earlier[:SHOWN_CHARS]


def describe(tokenizer: Tokenizer, explanation: Explanation, asked: Explained) -> dict[str, Any]:
    """The object ``cache_explain``."""
    difference = explanation.difference
    place = None if difference is None else _place(tokenizer, difference, asked)
    changed: tuple[str, str] = ("differs", "")
    if difference is not None and place is not None:
        changed = _changed(difference, place, asked, explanation.page_size)
    missed = [_missed(span, changed, asked, explanation.page_size) for span in explanation.missed]
    size = len(asked.token_ids)
    cached = size - sum(span["tokens"] for span in missed)
    cause = _cause(missed, cached)
    shown: dict[str, Any] = {
        "cause": cause,
        "summary": "",
        "prompt_tokens": size,
        "cached_tokens": cached,
        "page_size": explanation.page_size,
        "missed": missed,
        "difference": None,
        "computed_meanwhile": explanation.meanwhile,
        "preemptions": explanation.preemptions,
    }
    if difference is not None and place is not None:
        shown["difference"] = _shown(difference, place, asked)
    shown["summary"] = _summary(shown, explanation)
    return shown


def _cause(missed: Sequence[dict[str, Any]], cached: int) -> str:
    """What most of the tokens were missed for."""
    tokens: dict[str, int] = {}
    for span in missed:
        tokens[span["cause"]] = tokens.get(span["cause"], 0) + span["tokens"]
    main = {cause: count for cause, count in tokens.items() if cause not in MINOR}
    if cached and not main:
        return "fully_cached"
    return max(main or tokens, key=lambda cause: tokens[cause])


def _summary(shown: dict[str, Any], explanation: Explanation) -> str:
    parts = [
        f"{shown['cached_tokens']} of {shown['prompt_tokens']} prompt tokens came from the cache."
    ]
    if explanation.meanwhile:
        parts.append(
            f"{explanation.meanwhile} of them were being computed for another request when this "
            "one came, which waited for them."
        )
    parts += [
        f"{span['tokens']} missed: {span['why']}."
        for span in shown["missed"]
        if span["cause"] == shown["cause"]
    ]
    if shown["cause"] == "fully_cached":
        parts.append("All that can come from the cache did.")
    if explanation.preemptions:
        parts.append(
            f"The request lost its pages to others {_times(explanation.preemptions)} before its "
            "first token; what the cache gave up meanwhile was computed again."
        )
    return " ".join(parts)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _shown(difference: Difference, place: _Place, asked: Explained) -> dict[str, Any]:
    index = place.message
    shared, here, earlier = place.beginnings
    return {
        "token": difference.token,
        "message": index,
        "role": None if index is None else asked.messages[index]["role"],
        "shared": shared,
        "here": here,
        "earlier": earlier,
        "earlier_ended_seconds_ago": _rounded(difference.seconds_ago),
    }


# ------------------------------------------------------------------------------- the place


def _place(tokenizer: Tokenizer, difference: Difference, asked: Explained) -> _Place:
    mine = [*map(tokenizer.token_bytes, asked.token_ids)]
    theirs = [*map(tokenizer.token_bytes, difference.earlier)]
    before = b"".join(mine[: difference.token])
    shared, here = _parted(before, b"".join(mine[difference.token :]))
    _, earlier = _parted(
        b"".join(theirs[: difference.token - difference.start]),
        b"".join(theirs[difference.token - difference.start :]),
    )
    # Other tokens may begin with the same characters.
    equal = common_prefix(here, earlier)
    shared, here, earlier = shared + here[:equal], here[equal:], earlier[equal:]
    at = _in_layout(asked.layout, shared, shared + here)
    message, tools = None, False
    if asked.layout is not None and at is not None:
        message = asked.layout.message_at(at)
        tools = asked.layout.tools_changed_at(at, earlier)
    return _Place(shared, here, earlier, None if tools else message, tools)


def _parted(before: bytes, after: bytes) -> tuple[str, str]:
    """As texts, cut before a character that the place is amid."""
    data, at = before + after, len(before)
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return data[:at].decode(errors="replace"), data[at:].decode(errors="replace")


def _in_layout(layout: Layout | None, shared: str, text: str) -> int | None:
    """The place behind ``shared`` in the rendering; None where the tokens are not its text."""
    if layout is None:
        return None
    for known in (text, text.removeprefix(" ")):  # which some tokenizers put before a text
        if layout.text.endswith(known):  # the beginning may be cut off
            return max(len(layout.text) - len(text) + len(shared), 0)
    return None


# ------------------------------------------------------------------------------- what has changed


def _changed(
    difference: Difference, place: _Place, asked: Explained, page_size: int
) -> tuple[Named, str]:
    """The cause, and what to say of it."""
    where = _where(place, asked)
    role = None if place.message is None else asked.messages[place.message]["role"]
    if role in (None, "system") and (found := drift(*place.beginnings)) is not None:
        what, now, then = found
        return "template_drift", (
            f"{what} {where} has changed, from {then!r} to {now!r}: what follows it cannot be "
            "shared; keep it out of the system prompt, or put it at the end"
        )
    if place.tools:
        return "tools_changed", (
            "the list of tools is another one, or in another order: what follows it in the prompt, "
            "messages too, cannot be shared; send the same tools in the same order"
        )
    if _drops_thoughts(place, asked):
        kept = place.message is not None and asked.messages[place.message].get("reasoning")
        who = (
            "the chat template leaves the thoughts of earlier turns out"
            if kept
            else "the earlier prompt has the model's thoughts, which the client did not send back: "
            "send reasoning with the assistant's message"
        )
        return "reasoning_dropped", f"{where}, {who}"
    if difference.removed is not None and not difference.inserted:
        return "text_removed", (
            f"{difference.removed} tokens that the closest earlier prompt has, {where}, are left "
            "out, as when the oldest turns are dropped: what follows has moved, and its KV with it"
        )
    if difference.inserted is not None and not difference.removed:
        return "text_inserted", (
            f"{difference.inserted} tokens are put in, {where}, that the closest earlier prompt "
            "does not have: what follows has moved, and its KV with it"
        )
    small = difference.token < page_size
    if small and not _rejoins(difference, asked.token_ids):
        return _never_seen(asked)
    if place.message is None and asked.layout is not None:
        return "template_changed", (
            "what the chat template itself writes is different, as with other template variables"
        )
    return "text_changed", f"the text {where} differs from the closest earlier prompt's"


def _where(place: _Place, asked: Explained) -> str:
    if place.message is not None:
        return f"in message {place.message} ({asked.messages[place.message]['role']})"
    return "in the prompt" if asked.layout is None else "in what the chat template writes"


def _drops_thoughts(place: _Place, asked: Explained) -> bool:
    """Whether the earlier prompt goes on with thoughts, and this one does not."""
    for opener in asked.openers:
        for text, wanted in ((place.earlier, True), (place.here, False)):
            whole = place.shared[-len(opener) :] + text
            at = whole.find(opener)
            first = len(place.shared[-len(opener) :])
            begins = at >= 0 and not whole[first : max(at, first)].strip()
            if (begins and at + len(opener) > first) is not wanted:
                break
        else:
            return True
    return False


def _rejoins(difference: Difference, token_ids: Sequence[int]) -> bool:
    """Whether the earlier prompt is the same again a little later."""
    theirs = difference.earlier[difference.token - difference.start + 1 :]
    mine = token_ids[difference.token + 1 : difference.token + len(theirs) + REJOINING]
    return bool(_runs(theirs) & _runs(mine))


def _runs(token_ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(token_ids[i : i + REJOINING]) for i in range(len(token_ids) - REJOINING + 1)}


# ------------------------------------------------------------------------------- words


def _missed(
    span: Missed, changed: tuple[str, str], asked: Explained, page_size: int
) -> dict[str, Any]:
    cause, why = _words(span, changed, asked, page_size)
    return {
        "from": span.start,
        "to": span.end,
        "tokens": span.end - span.start,
        "cause": cause,
        "why": why,
        **({"seconds_ago": _rounded(span.seconds_ago)} if span.cause == "evicted" else {}),
    }


def _words(
    span: Missed, changed: tuple[str, str], asked: Explained, page_size: int
) -> tuple[str, str]:
    """The cause and what to say of it."""
    match span.cause:
        case "differs":
            return changed
        case "never_seen":
            return _never_seen(asked)
        case "evicted":
            return span.cause, _evicted(span)
        case "being_computed":
            states = {
                "running": "is being computed",
                "waiting": "waits to be computed",
                "preempted": "was preempted, and waits",
            }
            state = states.get(span.by or "", "is being computed")
            return span.cause, f"an earlier request has these tokens, and {state} itself"
        case "not_computed":
            how = "was aborted" if span.by == "aborted" else "ended"
            return span.cause, f"an earlier request has these tokens, but {how} before their KV was"
        case "other_adapter":
            by = "the model without an adapter" if span.by is None else f"the adapter {span.by!r}"
            return span.cause, f"these tokens were computed with {by}, whose KV is another"
        case "other_segment_mask":
            return span.cause, (
                f"these tokens were computed with the segment mask {span.by}, whose KV is another"
            )
        case "segment_changed":
            return span.cause, (
                "the prompts part later in this segment, whose tokens see each other whole"
            )
        case "below_page":
            return span.cause, (
                f"the shared part ends inside a page; whole pages of {page_size} tokens are shared"
            )
        case "new":
            return span.cause, "this goes on where the closest earlier prompt and its answer ended"
        case "last_token":
            return span.cause, (
                "the last token is always computed, since the answer begins with its row"
                + (", and its page with it" if span.end - span.start > 1 else "")
            )
        case "reads_prompt":
            return span.cause, (
                "prompt_logprobs, and echo with logprobs, read the rows of these tokens, which are "
                "computed for that"
            )
        case "prefix_caching_off":
            return span.cause, "the server runs with --no-prefix-caching"


def _never_seen(asked: Explained) -> tuple[Named, str]:
    if asked.salted:
        return "not_seen_under_salt", (
            "no prompt that is remembered under this key and cache_salt goes on like this; what "
            "others have sent is neither used nor told"
        )
    return "never_seen", "no prompt that is remembered goes on like this"


def _evicted(span: Missed) -> str:
    if span.by is None or span.seconds_ago is None:
        return "these tokens were cached and have been evicted, longer ago than is remembered"
    why = {
        "prompt": "a prompt needed their pages",
        "answer": "an answer that grew needed their pages",
        "broken": "their KV held what is not a number",
        "cleared": "the cache was emptied",
    }[span.by]
    return f"these tokens were cached until {span.seconds_ago:.1f} s ago, when {why}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
