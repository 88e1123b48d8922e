"""Random programs for an engine: what a user may do with it, in any order.

A program is a list of operations, drawn by Hypothesis and run in one event loop. Where an
operation needs something to act upon, it takes one of those that are open, by number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import strategies as st

_DRAW = random.Random(11)


def _tokens(count: int) -> list[int]:
    return [_DRAW.randrange(1, 250) for _ in range(count)]


_SYSTEM = _tokens(40)
PROMPTS: list[list[int] | str] = [  # most of them begin alike
    [*_SYSTEM, *_tokens(5)],
    [*_SYSTEM, *_tokens(9)],
    [*_SYSTEM[:20], *_tokens(30)],
    [*_SYSTEM, *_tokens(150)],
    _tokens(3),
    [7],
    "Once upon a time",
]
CHATS = [
    [{"role": "user", "content": "Name a colour."}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one."},
    ],
]
PARAMS: list[dict[str, Any]] = [
    {"max_tokens": 6},
    {"max_tokens": 16, "ignore_eos": True, "logprobs": 1},
    {"max_tokens": 12, "temperature": 0.9, "seed": 1},
    {"max_tokens": 10, "temperature": 1.2, "seed": 2, "top_k": 30, "repetition_penalty": 1.2},
    {"max_tokens": 1},
    {"max_tokens": 40, "ignore_eos": True, "stop": ["a", "e"]},
    {"max_tokens": 60, "ignore_eos": True},
]


@dataclass(frozen=True)
class Submit:
    """Begin a request.

    Attributes:
        kind: by which method.
        prompt: of PROMPTS, or of CHATS; the first one of a batch of three.
        params: of PARAMS.
        priority: as it is.
        fault: the token, counted from 0, at which its logits processor raises.
        entered: whether a stream is entered at once, rather than when it is first read.
        timeout: seconds of work.
    """

    kind: Literal["generate", "chat", "batch", "stream", "stream_chat"]
    prompt: int
    params: int
    priority: int
    fault: int | None
    entered: bool
    timeout: float | None = None


@dataclass(frozen=True)
class Read:
    """Read so many chunks of a stream."""

    which: int
    count: int


@dataclass(frozen=True)
class Cancel:
    """Cancel a request; what a way is for another kind of request is another one for this."""

    which: int
    way: Literal["cancel", "twice", "close", "scope"]


@dataclass(frozen=True)
class Drop:
    """Forget a stream without closing it."""

    which: int


@dataclass(frozen=True)
class Finish:
    """Wait for a request."""

    which: int


@dataclass(frozen=True)
class Pause:
    """Let the event loop turn so often, or, if 0, until nothing is left to do in MLX."""

    turns: int


@dataclass(frozen=True)
class Call:
    """A function of the user's takes its turn."""

    raises: bool


@dataclass(frozen=True)
class Ask:
    """Ask about a prompt, without a turn; cancelled after so many turns of the event loop."""

    chat: bool
    cancelled_after: int | None


@dataclass(frozen=True)
class File:
    """Save the prompt cache, or load it."""

    save: bool


@dataclass(frozen=True)
class Break:
    """The model's call after so many others fails."""

    after: int


@dataclass(frozen=True)
class Shutdown:
    """Shut the engine down, and wait for that or go on meanwhile."""

    timeout: float | None
    wait: bool


@dataclass(frozen=True)
class Start:
    """Start it; cancelled after so many turns of the event loop, if that is a number."""

    cancelled_after: int | None


Operation = (
    Submit | Read | Cancel | Drop | Finish | Pause | Call | Ask | File | Break | Shutdown | Start
)


def programs(*, priorities: bool) -> st.SearchStrategy[list[Operation]]:
    """Programs; those for ``SimpleEngine`` know of no priorities."""
    which = st.integers(0, 7)
    submit = st.builds(
        Submit,
        kind=st.sampled_from(("generate", "stream", "stream", "chat", "stream_chat", "batch")),
        prompt=st.integers(0, len(PROMPTS) - 1),
        params=st.integers(0, len(PARAMS) - 1),
        priority=st.integers(-1, 1) if priorities else st.just(0),
        fault=st.none() | st.none() | st.none() | st.integers(0, 12),
        entered=st.booleans(),
        timeout=st.none() | st.none() | st.none() | st.sampled_from((1e-6, 0.005, 0.02)),
    )
    cancel = st.builds(Cancel, which, st.sampled_from(("cancel", "twice", "close", "scope")))
    rest = st.one_of(
        st.builds(Finish, which),
        st.builds(Call, st.booleans()),
        st.builds(Ask, st.booleans(), st.none() | st.integers(0, 3)),
        st.builds(File, st.booleans()),
        st.builds(Break, st.integers(0, 30)),
        st.builds(Shutdown, st.sampled_from((0, 0, 0.02, None)), st.booleans()),
        st.builds(Start, st.none() | st.none() | st.integers(0, 12)),
    )
    read = st.builds(Read, which, st.integers(1, 10))
    pause = st.builds(Pause, st.sampled_from((0, 1, 2, 5, 20, 100)))
    # More requests than anything else, and time for them to come somewhere.
    drop = st.builds(Drop, which)
    step = st.one_of(submit, submit, submit, read, pause, cancel, drop, rest)
    return st.lists(step, min_size=4, max_size=30)
