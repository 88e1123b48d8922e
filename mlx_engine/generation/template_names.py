"""The variables that a model's chat template reads: all that a request may give to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase


def split_kwargs(
    kwargs: Mapping[str, Any], tokenizer: TokenizerWrapper
) -> tuple[dict[str, Any], list[str]]:
    """Variables that the chat template gets of these, and names that it does not look at.

    What is for ``apply_chat_template`` itself never passes: it would have another template
    used, or give something else than a text.
    """
    if not kwargs:
        return {}, []
    names = _names(tokenizer)
    passed = {name: value for name, value in kwargs.items() if name in names}
    return passed, [name for name in kwargs if name not in names]


def _names(tokenizer: TokenizerWrapper) -> frozenset[str]:
    renderer = tokenizer._chat_template or _own_renderer(tokenizer)
    if renderer is not None:  # some families come with a function in the place of a template
        names = frozenset(inspect.signature(renderer).parameters)
    else:
        template = tokenizer.chat_template
        every = template.values() if isinstance(template, Mapping) else (template,)
        names = frozenset[str]().union(*(_names_in(text) for text in every if text is not None))
    if tokenizer._thinking_kwarg in names:
        names |= {"enable_thinking"}  # mlx_lm passes it on by the name that is read
    return names - _OF_THE_CALL


def _own_renderer(tokenizer: TokenizerWrapper) -> Any:
    own = getattr(type(tokenizer._tokenizer), "apply_chat_template", None)
    return None if own is PreTrainedTokenizerBase.apply_chat_template else own


@functools.lru_cache(maxsize=16)
def _names_in(template: str) -> frozenset[str]:
    """The variables that a template takes from outside; none if it is not valid."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])
    try:
        found = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateError:  # rendering it will tell
        return frozenset()
    return frozenset(found) - environment.globals.keys()


class _GenerationTag(jinja2.ext.Extension):
    """The block with which templates mark answers for training; transformers knows it too."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes of the block's content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# ``documents`` is a variable of templates as well; the last ones are functions for them.
_OF_THE_CALL = (
    frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    | {"messages", "raise_exception", "strftime_now"}
) - {"documents"}
