"""The variables that a model's chat template reads: all that a request may give to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from transformers import PreTrainedTokenizerBase


@functools.lru_cache(maxsize=32)
def names_in(template: str) -> frozenset[str]:
    """The variables that a template takes from outside; none if it is not valid.

    What is for ``apply_chat_template`` itself is never one: it would have another template
    used, or give something else than a text.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])
    try:
        found = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateError:  # rendering it will tell
        return frozenset()
    return frozenset(found) - environment.globals.keys() - _OF_THE_CALL


def names_of(renderer: Callable[..., object]) -> frozenset[str]:
    """The arguments of a function that some families come with in the place of a template.

    One that passes on what it is given reads what it names: ``if "enable_thinking" in kwargs``.
    """
    parameters = inspect.signature(renderer).parameters
    names = {name for name in parameters if parameters[name].kind not in _REST}
    code = getattr(renderer, "__code__", None)
    if code is not None and any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        names |= {const for const in code.co_consts if const in _PASSED_ON}
    return frozenset(names) - _OF_THE_CALL


class _GenerationTag(jinja2.ext.Extension):
    """The block with which templates mark answers for training; transformers knows it too."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes of the block's content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_REST = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
_PASSED_ON = ("enable_thinking", "thinking", "thinking_mode", "reasoning_effort")
# ``documents`` is a variable of templates as well; the last ones are functions for them.
_OF_THE_CALL = (
    frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    | {"messages", "raise_exception", "strftime_now"}
) - {"documents"}
