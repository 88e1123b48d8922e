"""Calls in reasoning that a model does not close: they count if the answer ends with them."""

from __future__ import annotations

from mlx_engine.chat.answer_parts import AnswerParts
from mlx_engine.chat.call_section import Section, read_section
from mlx_engine.chat.source import Steps


def ends_with_calls(parts: AnswerParts, section: Section) -> Steps[bool]:
    """Whether calls begin here, and the answer ends behind them; else a character is reasoning.

    The text is held back until it is known. It is read by a parser of its own meanwhile, and left
    to be read once more.
    """
    source = parts.source
    trial = AnswerParts(parts.calls.tools)
    steps = _read(trial, section)
    source.record()
    while True:
        trial.source.add(source.text[source.at :])
        trial.source.ended = source.ended
        source.at = len(source.text)
        next(steps, None)
        trial.pieces.clear()
        behind = trial.source.text[trial.source.at :].strip()
        are_right = all(call.ok for call in trial.calls.done)
        if source.ended or not are_right or (behind and not trial.is_reading):
            break
        yield
    source.rewind()
    source.stop_recording()
    if not behind and are_right and trial.calls.done:
        return True
    parts.reasoning(source.text[source.at])
    source.at += 1
    return False


def _read(trial: AnswerParts, section: Section) -> Steps[None]:
    yield from trial.source.read(section.marker)
    yield from read_section(trial.source, trial.calls, section)
    trial.is_reading = False
