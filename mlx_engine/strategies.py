"""Strategies: how a prompt is prefilled, and how an answer is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from mlx_engine.checks import check_options, flag, integer, number, option, path_text, shown
from mlx_engine.errors import InvalidRequest


def _model(name: str, value: object) -> object:
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise InvalidRequest(name, f"must be a path or a Hugging Face id, not {shown(value)}")
    return value


def _model_or_none(name: str, value: object) -> object:
    return None if value is None else _model(name, value)


def _depth(name: str, value: object, most: int) -> int | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    return integer(name, value, low=1, high=most, also="'auto'")


@dataclass(frozen=True, slots=True)
class DraftModel:
    """Decode with a small model that proposes tokens, which the large one verifies together.

    Every token is the large model's own choice, so that the answer is the one it gives alone
    (speculative decoding: https://arxiv.org/abs/2211.17192; here a proposal is kept only
    where it is what was sampled).

    Attributes:
        model: folder or Hugging Face id of a model with the same tokenizer.
        num_draft_tokens: proposals for each verification, 1 to 16; ``"auto"`` chooses up to 4
            by measuring while decoding, 0 included, where it does not pay.
        fallback: where this cannot be done, decode plainly and say so in ``result.notes``,
            rather than refuse to start.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """

    model: Annotated[str | os.PathLike[str], option(_model)]
    num_draft_tokens: Annotated[
        int | Literal["auto"], option(_depth, "proposals at a time", most=16)
    ] = "auto"
    fallback: Annotated[bool, option(flag)] = False

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class MTP:
    """Decode with the model's own multi-token-prediction head, as ``DraftModel`` does with a
    model (https://arxiv.org/abs/2412.19437, section 2.2).

    Attributes:
        depth: tokens proposed for each verification, 1 to 4; ``"auto"`` chooses by measuring
            while decoding, 0 included, where it does not pay.
        head: file that ``mlx-engine extract-mtp`` wrote; ``None`` looks for ``mtp.safetensors``
            in the model's folder, then for the head in the model's own files.
        fallback: where this cannot be done, decode plainly and say so in ``result.notes``,
            rather than refuse to start.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """

    depth: Annotated[int | Literal["auto"], option(_depth, most=4)] = "auto"
    head: Annotated[str | os.PathLike[str] | None, option(_model_or_none)] = None
    fallback: Annotated[bool, option(flag)] = False

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, slots=True)
class SpecPrefill:
    """Prefill only the chunks of a long prompt that a small model finds important
    (https://arxiv.org/abs/2502.02789).

    The answer is the one that the model gives to the prompt with the other chunks masked, at
    the positions that the tokens have: not the same as with a full prefill.

    Attributes:
        draft: folder or Hugging Face id of a model with the same tokenizer; ``None`` is the
            model itself. In a request, ``None`` is the engine's.
        keep: share of the prompt's chunks of 32 tokens to prefill, in (0, 1]. The first and
            the last one, and a few others, always are.
        threshold: tokens of the prompt that are not in the prompt cache, from which on it
            is used; shorter ones are prefilled in full, as ``result.notes`` says then.
        lookahead: tokens that the small model continues the prompt with, to see which parts
            of it they attend to.
        report_ranges: tell in ``result.usage.kept_ranges`` what was kept.
        fallback: where this cannot be done, prefill in full and say so in ``result.notes``,
            rather than refuse to start.

    Raises:
        InvalidRequest: a value is of the wrong type or out of its range.
    """

    draft: Annotated[str | os.PathLike[str] | None, option(_model_or_none)] = None
    keep: Annotated[
        float, option(number, "share of a long prompt to prefill", low=0, high=1, above=True)
    ] = 0.2
    threshold: Annotated[int, option(integer, "tokens from which on a prompt is long", low=0)] = (
        8192
    )
    lookahead: Annotated[int, option(integer, low=0)] = 8
    report_ranges: Annotated[bool, option(flag)] = False
    fallback: Annotated[bool, option(flag)] = False

    def __post_init__(self) -> None:
        check_options(self)


Decode = DraftModel | MTP | Literal["auto"] | None
EngineDefault = Literal["default"]  # what a request says that leaves a strategy to its engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategies:
    """How the prompts of an engine are prefilled, and how it decodes; any with any.

    Attributes:
        prefill: ``None`` prefills all of a prompt.
        decode: ``None`` decodes one token after another.
    """

    prefill: SpecPrefill | None = None
    decode: DraftModel | MTP | None = None

    @classmethod
    def of(cls, prefill: SpecPrefill | None, decode: Decode) -> Strategies:
        """Strategies that an engine was asked for; ``"auto"`` is ``MTP`` where there is a head.

        Raises:
            InvalidRequest: a value is something else.
        """
        _check_prefill(prefill)
        if isinstance(decode, str) and decode == "auto":
            decode = MTP(fallback=True)
        if decode is not None and not isinstance(decode, DraftModel | MTP):
            raise InvalidRequest(
                "decode", f"must be DraftModel(...), MTP(), 'auto' or None, not {shown(decode)}"
            )
        return cls(prefill=prefill, decode=decode)

    @property
    def drafts(self) -> tuple[str, ...]:
        """The other models that are needed."""
        found: list[str] = []
        if self.prefill is not None and self.prefill.draft is not None:
            found.append(path_text(self.prefill.draft))
        if isinstance(self.decode, DraftModel):
            found.append(path_text(self.decode.model))
        return tuple(dict.fromkeys(found))

    def with_paths(self, change: Callable[[str], str]) -> Strategies:
        """The same strategies, whose models are where ``change`` says of each path."""
        prefill, decode = self.prefill, self.decode
        if prefill is not None and prefill.draft is not None:
            prefill = replace(prefill, draft=change(path_text(prefill.draft)))
        if isinstance(decode, DraftModel):
            decode = replace(decode, model=change(path_text(decode.model)))
        elif decode is not None and decode.head is not None:
            decode = replace(decode, head=change(path_text(decode.head)))
        return Strategies(prefill=prefill, decode=decode)

    def of_request(
        self, prefill: SpecPrefill | EngineDefault | None, decode: EngineDefault | None
    ) -> Strategies:
        """Strategies of a request that asks for these.

        Raises:
            InvalidRequest: it asks for what this engine was not made for.
        """
        asked: tuple[tuple[str, object], ...] = (("prefill", prefill), ("decode", decode))
        for name, value in asked:
            if isinstance(value, str) and value == "as engine":
                raise InvalidRequest(name, f'is called "default" now: write {name}="default"')
        # Only texts are compared: what else a caller gives may fail at that, or be an array.
        whole = isinstance(prefill, str) and prefill == "default"
        sparse = self.prefill if whole else self._prefill(prefill)  # type: ignore[arg-type]
        if decode is not None and not (isinstance(decode, str) and decode == "default"):
            raise InvalidRequest(
                "decode", f"a request may switch it off with None, not change it: {shown(decode)}"
            )
        return Strategies(prefill=sparse, decode=None if decode is None else self.decode)

    def _prefill(self, asked: SpecPrefill | None) -> SpecPrefill | None:
        _check_prefill(asked)
        if asked is None:
            return None
        if self.prefill is None:
            raise InvalidRequest("prefill", "this engine was made without prefill=SpecPrefill(...)")
        own = self.prefill.draft
        if asked.draft is None:
            return replace(asked, draft=own)
        if own is None or os.path.abspath(asked.draft) != os.path.abspath(own):
            raise InvalidRequest("prefill", "the draft is the engine's; leave it out in a request")
        return asked


def _check_prefill(value: object) -> None:
    if value is not None and not isinstance(value, SpecPrefill):
        raise InvalidRequest("prefill", f"must be SpecPrefill(...) or None, not {shown(value)}")
