"""Values that engines give back: chunks, results and what was measured on the way."""

from __future__ import annotations

import builtins
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mlx_engine.cache_stats import PromptCacheStats
from mlx_engine.memory_stats import NOTHING, MemoryStats
from mlx_engine.other_attributes import WithAdvice
from mlx_engine.plain import PlainData, json_text, plain_result, short_repr
from mlx_engine.usage import Timings as Timings
from mlx_engine.usage import Usage as Usage

FinishReason = Literal["stop", "length", "tool_calls", "timeout", "cancelled"]
Segment = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a long piece of work.

    Attributes:
        phase: ``download``, ``convert`` and ``load`` happen while an engine starts,
            ``score`` (with ``SpecPrefill``) and ``prefill`` at the beginning of a request,
            ``batch`` in ``map`` and ``generate_batch``.
        done: bytes so far (tokens in ``score`` and ``prefill``, requests in ``batch``).
        total: of the same unit; ``None`` while it is not known.
    """

    phase: Literal["download", "convert", "load", "score", "prefill", "batch"]
    done: int
    total: int | None


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability (natural logarithm) of one emitted token.

    Probabilities are those after the logits processors and before the temperature and the
    sampling filters, as in mlx-lm.

    Attributes:
        token: the token id.
        logprob: its log-probability.
        top: the most probable tokens at this place, best first; as many as
            ``SamplingParams.logprobs`` asks for. They have none of their own.
        text: of the token by itself, as in the middle of a text; the parts of a character that
            several tokens share are U+FFFD.
        bytes: of that text in UTF-8, and of such a part those that are the token's.
    """

    token: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    text: str = ""
    bytes: builtins.bytes = b""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wants made.

    Attributes:
        name: of the tool; empty if it could not be seen.
        arguments: for the tool; empty if the call is malformed.
        raw: the model's own text between the markers.
        error: why the call must not be made; ``None`` if it may be.
        id: of the call, unique in a conversation: the model's own where its format has one.
    """

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    raw: str = ""
    error: str | None = None
    id: str = ""

    @property
    def ok(self) -> bool:
        """Whether the call may be made: it names a tool of the request, with its arguments."""
        return self.error is None

    def reply(self, content: object) -> Any:
        """The message with the tool's answer, to be appended to the messages of the chat.

            messages.append(call.reply("21 degrees"))

        Args:
            content: text, or any value that JSON has a form for, which the model gets as JSON.

        Returns a ``Message``; its type fits into a list of plain dictionaries as well.

        Raises:
            InvalidRequest: ``content`` is neither.
        """
        text = content if isinstance(content, str) else json_text("content", content)
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": text}

    def _as_message(self) -> dict[str, Any]:
        # What the model wrote goes back as it was, so that it can see its mistake.
        arguments = json_text("tool_calls", self.arguments) if self.ok else self.raw
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The part of a tool call that a chunk adds.

    Attributes:
        index: of the call in the answer, from 0.
        id: of the call; with its first delta only.
        name: of the tool; with the first delta only.
        arguments: the next piece of the arguments, as JSON text. All pieces of a call that came
            out right, joined, are its arguments.
        error: why the call must not be made; with the last delta of such a call only.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationChunk(PlainData):
    """The part of an answer that one token, or a few, added.

    A chunk may have tokens and no text (the text is held back until a character or a
    possible stop string is complete) or text and no tokens (held-back text at the end).
    All chunks of a stream, joined, are the result exactly.

    Attributes:
        text: new text of this segment.
        tokens: new token ids, the end-of-sequence token included.
        segment: which part of the answer the text belongs to.
        logprobs: one entry a token, if asked for.
        finish_reason: set on the last chunk only.
        tool_call: what the chunk adds to a tool call, which may be nothing; its text then is the
            model's own. Set in each chunk of the segment ``tool_call``, and in no other.
    """

    text: str
    tokens: tuple[int, ...] = ()
    segment: Segment = "content"
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    tool_call: ToolCallDelta | None = None

    @property
    def content(self) -> str:
        """Its text if that is for whoever reads the answer, and ``""`` if not."""
        return self.text if self.segment == "content" else ""

    @property
    def reasoning(self) -> str:
        """Its text if that is thought aloud, and ``""`` if not."""
        return self.text if self.segment == "reasoning" else ""


@dataclass(frozen=True, slots=True)
class GenerationResult(WithAdvice):
    """A whole answer.

    Attributes:
        text: the answer without reasoning and tool calls; stop strings are not part of it.
        tokens: every generated token id, the end-of-sequence token included.
        finish_reason: ``stop`` (end of sequence, a stop string or a stop token), ``tool_calls``
            (the same without a stop string, and there are calls that may be made), ``length``
            (``max_tokens`` or the context is used up), ``timeout`` (the request's own ``timeout``
            is over, and this is what there was by then) or ``cancelled``.
        usage: token counts.
        timings: seconds.
        reasoning: what the model thought aloud, in chats with models that do.
        tool_calls: calls that the model asked for; malformed ones say so in ``error``.
        logprobs: one entry a token, if asked for.
        notes: what was done in another way than asked, one sentence each.
        request_id: the engine's name for the request.
        stop_string: that of ``stop`` which has ended the answer; ``None`` if another end has.
        parsed: what ``output=`` has asked for, made of ``text``; ``None`` without it, and where
            the answer was cut, as ``notes`` says then. Such an answer has no calls.
    """

    _parts: ClassVar = {"usage": Usage, "timings": Timings}

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    notes: tuple[str, ...] = ()
    request_id: str = ""
    stop_string: str | None = None
    parsed: Any = None

    __repr__ = short_repr

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """The result as plain data, all of which JSON has a form for.

            print(json.dumps(result.to_dict()), file=lines)

        Args:
            tokens: whether the ids of the tokens are in it, as ``tokens``.
        """
        return plain_result(self, tokens=tokens)

    def message(self) -> Any:
        """The answer as a message, to be appended to the messages of the chat.

        The result itself may stand there as well. Calls are those of ``tool_calls``, each of
        which is answered with its ``reply``; those that must not be made have the model's own
        text in the place of their arguments.

        Returns:
            A ``Message``; its type fits into a list of plain dictionaries as well.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call._as_message() for call in self.tool_calls]
        return message


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model would get it.

    Attributes:
        text: in the model's chat template, up to where the answer begins.
        tokens: the same in token ids.
        cached_tokens: as many of the first ones are in the prompt cache now.
        notes: what would be done in another way than asked, one sentence each.
    """

    text: str
    tokens: tuple[int, ...]
    cached_tokens: int = 0
    notes: tuple[str, ...] = ()

    __repr__ = short_repr


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """Fate of the requests that were in flight when an engine was shut down.

    Requests are what has an id that its caller knows: answers, whole or as streams. Of a start, a
    function of ``run_blocking`` or a prompt cache on its way to a file nothing is told here,
    though it is drained or aborted in the same way.

    Attributes:
        finished: ids of those that came to their own end.
        aborted: ids of those that were ended; their callers got ``EngineStopped``.
    """

    finished: tuple[str, ...] = ()
    aborted: tuple[str, ...] = ()


class EngineState(enum.StrEnum):
    """Where an engine is in its life; each is equal to its string."""

    CREATED = "created"  # made, or its start failed: nothing is loaded
    STARTING = "starting"  # the model is being loaded
    RUNNING = "running"  # requests are taken
    DRAINING = "draining"  # what is in flight may finish, new requests are refused
    STOPPED = "stopped"  # nothing is in flight and the model is gone; may be started again
    FAILED = "failed"  # it cannot serve any more; restart it, or shut it down


@dataclass(frozen=True, slots=True)
class EngineStats(PlainData):
    """A snapshot of an engine; cheap, and from any thread.

    Attributes:
        state: where the engine is in its life.
        running: requests in work now (0 or 1 in ``SimpleEngine``).
        waiting: requests in the queue.
        finished: requests that came to their own end.
        cancelled: requests that were cancelled or aborted.
        failed: requests that ended in an error.
        rejected: requests refused with ``EngineBusy``.
        prompt_tokens: of all prompts taken up so far.
        cached_tokens: of which these came from the prompt cache.
        completion_tokens: generated so far.
        draft_tokens: proposed by a draft model or MTP head.
        accepted_tokens: of which the model itself would have chosen these.
        prefill_seconds: spent in prefill on the MLX thread.
        decode_seconds: spent in decode on the MLX thread.
        batch_size: requests that decode together now.
        kv_bytes: in the KV caches of the requests in work.
        prompt_cache: of the prompt cache.
        memory: what the engine has of the memory, and who has what in its process.
        preemptions: times that a request was paused for want of memory.
    """

    state: EngineState
    running: int
    waiting: int
    finished: int
    cancelled: int
    failed: int
    rejected: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    draft_tokens: int
    accepted_tokens: int
    prefill_seconds: float
    decode_seconds: float
    batch_size: int
    kv_bytes: int
    prompt_cache: PromptCacheStats
    memory: MemoryStats = NOTHING
    preemptions: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over proposed tokens; 0 if none was proposed."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over time spent decoding, all requests together; 0 before the first."""
        return self.completion_tokens / self.decode_seconds if self.decode_seconds else 0.0
