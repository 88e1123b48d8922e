"""Warming a model up: what it computes first is computed at start, not in somebody's step.

MLX makes a program of what it runs for the first time: mlx_lm's models have functions that are
compiled (on the CPU back end by a C++ compiler, seconds each), and Metal builds its kernels when
they are first used, which are others for long inputs than for short ones. What a chat template
takes is found out by rendering small conversations.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from mlx_engine.chat.template import ChatTemplate
from mlx_engine.config import ModelConfig
from mlx_engine.core.counters import EngineCounters
from mlx_engine.core.stop import checkpoint
from mlx_engine.errors import InvalidRequest
from mlx_engine.generation.cache.joint_cache import merge
from mlx_engine.generation.cache.kv_cache import Cache, make_kv_cache, quantize
from mlx_engine.generation.constraint import empty_masks, masked
from mlx_engine.generation.prefill import ChunkSize, may_pad, padded_prefill, prefilled
from mlx_engine.generation.request import Request
from mlx_engine.generation.runner import ModelRunner
from mlx_engine.generation.sampler import Sampler, can_be_sampled
from mlx_engine.generation.sampling import make_sampling, token_logprob
from mlx_engine.generation.speculative.decoder import SpeculativeDecoder
from mlx_engine.generation.speculative.depth import DepthChooser
from mlx_engine.generation.speculative.setup import Speculation
from mlx_engine.models.loading import LoadedModel
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.params import SamplingParams
from mlx_engine.requests import ChatPrompt, GenerationRequest, TextPrompt

_LONG = 64  # tokens: enough for the kernels of long inputs, soon done by a large model
_SHORT = 8  # tokens, where there are no such kernels: a CPU takes a tenth of a second for each
_FEW, _TIMES = 5, 3  # tokens that are timed, and how often, if they seem to take long
_STEPS = 2
_TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
}
_CALL = {"name": "read", "arguments": {"path": "a"}}
_TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is in a?"},
    {"role": "assistant", "tool_calls": [{"id": "call00001", "function": _CALL}]},
    {"role": "tool", "tool_call_id": "call00001", "content": "One line."},
    {"role": "user", "content": "And in b?"},
]
_EVERYTHING = SamplingParams(  # with a seed: the global random state stays as it is
    temperature=0.7,
    top_p=0.9,
    min_p=0.01,
    xtc_probability=0.5,
    top_k=20,
    seed=0,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={0: 1.0},
)


def warm_up(runner: ModelRunner, *, batched: bool) -> None:
    """Prefill, decode and sample a little, in the ways of this engine. On the MLX thread.

    Nothing of it stays: no stored prompt, no count, no random number.

    Args:
        batched: whether requests share a batch.

    Raises:
        Interrupted: it should stop; asked before each call of the model.
        Exception: whatever MLX raises.
    """
    try:
        _chats(runner.loaded.vocabulary)
        _alone(runner.loaded, runner.config)
        _time(runner.loaded, runner.config, runner.chunk)
        if batched:
            _together(runner.loaded, runner.config)
        strategies = runner.strategies
        if strategies.speculation is not None:
            _speculative(runner.loaded, runner.config, strategies.speculation)
        if strategies.sparse is not None and strategies.sparse.draft.loaded is not runner.loaded:
            draft = strategies.sparse.draft
            _alone(draft.loaded, draft.config)
            _time(draft.loaded, draft.config, runner.draft_chunk)
    finally:
        mx.synchronize(generation_stream)
        mx.clear_cache()


def _prompt(loaded: LoadedModel, config: ModelConfig, most: int | None = None) -> list[int]:
    """Token ids that every model has, a prefill chunk of them at most, and one more."""
    if most is None:
        most = _LONG if mx.default_device().type == mx.DeviceType.gpu else _SHORT
    room = most if loaded.context_length is None else loaded.context_length - _STEPS
    count = max(4, min(most, config.prefill_step_size + 1, room))
    return [1 + i % (loaded.vocab_size - 1) for i in range(count)]


def _chats(vocabulary: Vocabulary) -> None:
    if not vocabulary.tokenizer.has_chat_template:
        return
    template = ChatTemplate.of(vocabulary.tokenizer)
    for talk, tools in (
        (_TALK[1:2], None),
        (_TALK[:2], None),
        (_TALK[1:2], [_TOOL]),
        (_TALK[1:4], [_TOOL]),
        (_TALK, [_TOOL]),
    ):
        checkpoint()
        with contextlib.suppress(InvalidRequest):  # it takes no tools, or no calls of them
            template.render(ChatPrompt.of(talk, tools))


def _alone(loaded: LoadedModel, config: ModelConfig) -> None:
    prompt = _prompt(loaded, config)
    cache = prefilled(loaded.model, config, prompt)
    for sampled in (False, True):
        logits = _step(loaded, cache, [prompt[-1:]])
        quantize(cache, config)
        if sampled:
            mx.eval(_sampled(loaded, logits, prompt))
        else:
            mx.eval(mx.argmax(logits, axis=-1))


def _time(loaded: LoadedModel, config: ModelConfig, chunk: ChunkSize) -> None:
    """Have the first chunks be short where a token takes long, which it does on a CPU."""
    if mx.default_device().type == mx.DeviceType.gpu:
        return
    prompt, seconds = _prompt(loaded, config, _FEW), float("inf")
    for _ in range(_TIMES):
        began = time.perf_counter()
        prefilled(loaded.model, config, prompt)
        seconds = min(seconds, time.perf_counter() - began)
        if not chunk.is_long(seconds / len(prompt)):
            return
    chunk.expect(seconds / len(prompt))


def _together(loaded: LoadedModel, config: ModelConfig) -> None:
    """Step a row that joins another, and prefill prompts of two lengths together."""
    prompts = _halved(_prompt(loaded, config, _SHORT))
    joint, late = (merge([prefilled(loaded.model, config, each)]) for each in prompts)
    for entry, other in zip(joint, late, strict=True):
        entry.extend(other)
    sampler = Sampler([make_sampling(_EVERYTHING, vocab_size=loaded.vocab_size).options] * 2)
    for _ in range(_STEPS):
        logits = _step(loaded, joint, [each[-1:] for each in prompts])
        mx.eval(sampler(logits, [0, 0]))
    if may_pad(loaded.model, config):
        checkpoint()
        prompts = _halved(_prompt(loaded, config))
        empty = merge([make_kv_cache(loaded.model, config) for _ in prompts])
        padded_prefill(loaded.model, empty, [each[:-1] for each in prompts])


def _halved(prompt: list[int]) -> list[list[int]]:
    """Two prompts, of different lengths."""
    return [prompt, prompt[len(prompt) // 2 :]]


def _speculative(loaded: LoadedModel, config: ModelConfig, speculation: Speculation) -> None:
    """Proposals, and the forward that verifies them."""
    prompt = _prompt(loaded, config)
    request = Request(GenerationRequest(TextPrompt(prompt), _EVERYTHING), "warm-up")
    request.prompt = prompt
    request.sampling = make_sampling(_EVERYTHING, vocab_size=loaded.vocab_size)
    cache, drafter = make_kv_cache(loaded.model, config), speculation.make_drafter()
    drafter.begin(prompt, 0)
    checkpoint()
    with mx.stream(generation_stream):
        hidden = speculation.forward.prefill(mx.array([prompt[:-1]]), cache)
        mx.eval([entry.state for entry in cache])
    if hidden is not None:
        drafter.observe(prompt, 0, hidden[0])
    decoder = SpeculativeDecoder(
        request, speculation.forward, cache, drafter, DepthChooser(_STEPS), EngineCounters()
    )
    for _ in range(1 + _STEPS):  # nothing is proposed for the first token
        checkpoint()
        decoder.step()


def _step(loaded: LoadedModel, cache: Cache, inputs: list[list[int]]) -> mx.array:
    """Log-probabilities of shape (rows, vocabulary)."""
    checkpoint()
    with mx.stream(generation_stream):
        logits: mx.array = loaded.model(mx.array(inputs), cache=cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logprobs)
    return logprobs


def _sampled(loaded: LoadedModel, logprobs: mx.array, prompt: list[int]) -> mx.array:
    """The outcome of a choice with all processors and filters."""
    sampling = make_sampling(_EVERYTHING, vocab_size=loaded.vocab_size)
    with mx.stream(generation_stream):
        token_logprob(0, logprobs[0], 5)
        for processor in sampling.processors:
            logprobs = processor(mx.array(prompt, dtype=mx.uint32), logprobs)
        logprobs = masked(logprobs, ~empty_masks(1, logprobs))
        return can_be_sampled(logprobs, sampling.sample(logprobs, 0))
