"""For the tests of applications that use this library. Nothing here needs MLX.

Its files:

    safety/              whether an engine keeps its promises about cancellation
    fake.py              FakeEngine
    fake_options.py      its options
    fake_answer.py       its script
    script_error.py      mistakes in it
    fake_gate.py         a place in it where a test holds the work
    fake_model.py        what plays the script
    fake_request.py      what it was asked
    fake_prompt.py       prompts -> tokens
    fake_call.py         tool calls of a script -> tokens
    fake_constraint.py   whether they keep to what the request allows
    fake_text.py         pieces of an answer -> text
    fake_cache.py        its prompt cache
    player.py            what it does on the MLX thread
    scripted_request.py  a request at work in it
    fake_tokens.py       text -> tokens
"""

from mlx_engine.testing.fake import FakeEngine
from mlx_engine.testing.fake_answer import AnswerLike, Answers, FakeAnswer, Piece
from mlx_engine.testing.fake_gate import Gate
from mlx_engine.testing.fake_options import FakeOptions, Load
from mlx_engine.testing.fake_request import FakeRequest, Outcome
from mlx_engine.testing.safety.check import assert_cancellation_safe
from mlx_engine.testing.safety.report import (
    NotCancellationSafe,
    SafetyFailure,
    SafetyReport,
    SafetyRow,
)
from mlx_engine.testing.script_error import ScriptError

__all__ = [
    "AnswerLike",
    "Answers",
    "FakeAnswer",
    "FakeEngine",
    "FakeOptions",
    "FakeRequest",
    "Gate",
    "Load",
    "NotCancellationSafe",
    "Outcome",
    "Piece",
    "SafetyFailure",
    "SafetyReport",
    "SafetyRow",
    "ScriptError",
    "assert_cancellation_safe",
]


def __dir__() -> list[str]:
    return __all__
