"""``mlx-engine generate``: one answer."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from mlx_engine.cli import interrupts
from mlx_engine.cli.constraint import constraint_option
from mlx_engine.cli.options import chat_options, engine_options, sampling_params
from mlx_engine.cli.output import AnswerPrinter, ProgressBar, loaded, print_answer, remark, say
from mlx_engine.cli.values import time_limit
from mlx_engine.core.stream import GenerationStream
from mlx_engine.engine.simple import SimpleEngine
from mlx_engine.errors import InvalidRequest, renamed
from mlx_engine.outputs import GenerationResult
from mlx_engine.params import SamplingParams


def run(args: argparse.Namespace) -> int:
    """Answer one prompt; the exit code."""
    params = sampling_params(args)
    time_limit(args)  # checked before any model is loaded
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    if not args.prompt.strip():
        raise InvalidRequest("PROMPT", "must not be empty")
    bar = ProgressBar()
    try:
        with asyncio.Runner() as runner:
            result = interrupts.run(runner, _generate(args, params, bar))
    except InvalidRequest as error:
        if error.option != "constraint" or (option := constraint_option(args)) is None:
            raise
        raise renamed(error, option) from error
    if args.json:
        json.dump(result.to_dict(tokens=True), sys.stdout, ensure_ascii=False)
        sys.stdout.write("\n")
    elif not result.text and (result.reasoning or result.tool_calls):
        say("note: the answer has reasoning or tool calls only; --json shows them")
    remark(result, verbose=args.verbose, whole=args.json)
    return 0


async def _generate(
    args: argparse.Namespace, params: SamplingParams, bar: ProgressBar
) -> GenerationResult:
    try:
        async with SimpleEngine(**engine_options(args), on_progress=bar) as engine:
            loaded(bar)
            if not (args.raw or engine.has_chat_template or args.system is not None):
                say("note: the model has no chat template: the prompt is continued, as with --raw")
                args.raw = True
            if args.raw:
                limit = time_limit(args)
                stream = engine.stream_generate(args.prompt, params, on_progress=bar, **limit)
            else:
                stream = _chat(engine, args, params, bar)
            return await _answer(args, stream, bar)
    finally:
        bar.clear()


def _chat(
    engine: SimpleEngine, args: argparse.Namespace, params: SamplingParams, bar: ProgressBar
) -> GenerationStream:
    messages = [{"role": "user", "content": args.prompt.rstrip("\n")}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    options = {**chat_options(args), **time_limit(args)}
    return engine.stream_chat(messages, params, on_progress=bar, **options)


async def _answer(
    args: argparse.Namespace, stream: GenerationStream, bar: ProgressBar
) -> GenerationResult:
    printer = AnswerPrinter(bar, silent=args.json)
    try:
        return await print_answer(stream, printer)
    finally:
        printer.end()
