"""Loading: from a name to a model in memory. The only place that calls ``mlx_lm.load``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, ConcatenateKVCache, KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_engine.chat.formats import AnswerFormat, choose_format
from mlx_engine.chat.template import ChatTemplate
from mlx_engine.config import DEMO_MODEL, ModelConfig
from mlx_engine.core.stop import Interrupted
from mlx_engine.errors import InvalidRequest, MLXEngineError, ModelLoadError
from mlx_engine.models import demo, hub
from mlx_engine.models.detokenizer import SAMPLE_TEXT, make_detokenizer, mend_decoder
from mlx_engine.models.grammar_compiler import Grammars
from mlx_engine.models.vocabulary import Vocabulary
from mlx_engine.outputs import Progress, ProgressCallback

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "model_max_length",
    "n_positions",
    "seq_length",
)
_EVAL_SLICE = 64 * 2**20  # bytes of weights between two looks at should_stop


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory. It belongs to the MLX thread: made, used and dropped there.

    Attributes:
        model: takes token ids of shape (batch, n) and a cache, gives logits of shape
            (batch, n, vocabulary).
        vocabulary: what needs no MLX.
        config: config.json.
        path: the folder that it came from.
    """

    model: nn.Module
    vocabulary: Vocabulary
    config: dict[str, Any]
    path: Path

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """mlx_lm's wrapper of the model's tokenizer."""
        return self.vocabulary.tokenizer

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; ``None`` if the model names no limit."""
        return self.vocabulary.context_length

    @property
    def vocab_size(self) -> int:
        """Tokens that the logits cover."""
        return self.vocabulary.vocab_size


def find_model(
    config: ModelConfig,
    on_progress: ProgressCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Path:
    """The folder of the model, downloaded if need be; for the demo, what to convert.

    Does no MLX work, so it runs on any thread but the MLX thread: a download must not keep
    other engines waiting.

    Raises:
        ModelLoadError: there is no such folder or repository, or it cannot be fetched.
        Interrupted: ``should_stop`` said so.
    """
    name = config.model
    if config.revision is not None and (name == DEMO_MODEL or Path(name).expanduser().exists()):
        raise InvalidRequest("revision", "is for Hugging Face repositories; leave it out here")
    if name == DEMO_MODEL:
        if demo.demo_is_ready():
            return demo.demo_model_dir()
        return demo.fetch_demo_gguf(on_progress, should_stop)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file; give the folder that holds config.json")
    if path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelLoadError(
            f"{name}: there is no such folder, and it is no Hugging Face id such as "
            f"'mlx-community/Llama-3.2-3B-Instruct-4bit'; {DEMO_MODEL!r} is the built-in model"
        )
    return hub.download(name, config.revision, on_progress, should_stop)


def load_model(
    config: ModelConfig,
    source: Path,
    on_progress: ProgressCallback | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> LoadedModel:
    """Load the model that ``find_model`` found. On the MLX thread.

    Args:
        should_stop: asked between slices of weights of about 64 MB.

    Raises:
        ModelLoadError: the message names the folder and what is wrong with it.
        Interrupted: ``should_stop`` said so; nothing stays loaded.
    """
    stop = should_stop or _never
    if config.model == DEMO_MODEL:  # nothing is done when it has been converted already
        source = demo.convert_demo_model(source, on_progress, should_stop)
    check_files(source)
    try:
        model, tokenizer, model_config = mlx_lm.load(
            str(source),
            tokenizer_config={"trust_remote_code": config.trust_remote_code},
            adapter_path=config.adapter_path,
            lazy=True,
            return_config=True,
            trust_remote_code=config.trust_remote_code,
        )
        mend_decoder(tokenizer)
        make_detokenizer(tokenizer)  # tries what is right for this tokenizer, and remembers it
        _read_weights(model, on_progress, stop)
    except (MLXEngineError, Interrupted):
        raise
    except Exception as error:  # the border: mlx_lm, safetensors and transformers raise anything
        raise ModelLoadError(f"{source}: {_explain(error, config)}") from error
    eos, size = frozenset(tokenizer.eos_token_ids), vocab_size(model_config, tokenizer)
    own = context_length(model_config)
    vocabulary = Vocabulary(
        tokenizer=tokenizer,
        eos=eos,
        vocab_size=size,
        context_length=config.context_length if isinstance(config.context_length, int) else own,
        longest_token=max(map(len, tokenizer.get_vocab()), default=1),
        newline_tokens=tuple(tokenizer.encode("\n", add_special_tokens=False)),
        grammars=Grammars(tokenizer, size, eos),
        answer_format=answer_format(config, tokenizer),
        cuttable=all(_cuttable(entry) for entry in make_prompt_cache(model)),
    )
    return LoadedModel(model, vocabulary, model_config, source)


def unread_model(config: ModelConfig, folder: Path) -> nn.Module:
    """A model of which no weights are read: their shapes and types are known, and no more.

    Whoever evaluates what it computes reads them after all.

    Raises:
        ModelLoadError: the message names the folder and what is wrong with it.
    """
    check_files(folder)
    try:
        found = mlx_lm.utils.load_model(
            folder, lazy=True, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # the border, as above
        raise ModelLoadError(f"{folder}: {_explain(error, config)}") from error
    model: nn.Module = found[0]
    return model


def answer_format(config: ModelConfig, tokenizer: TokenizerWrapper) -> AnswerFormat:
    """How a model marks reasoning and writes calls, by its files or by the options.

    Raises:
        InvalidRequest: an option names a format that does not exist.
    """
    calls, reasoning = config.tool_format, config.reasoning_format
    if not tokenizer.has_chat_template:
        return choose_format(None, tool_format=calls, reasoning_format=reasoning)
    return ChatTemplate.of(tokenizer, calls, reasoning).format


def _cuttable(cache: Any) -> bool:
    """Whether a cache of one of mlx_lm's classes never loses what it needs to be cut back."""
    if isinstance(cache, CacheList):
        return all(_cuttable(part) for part in cache.caches)
    return isinstance(cache, (KVCache, ConcatenateKVCache))


def _never() -> bool:
    return False


def check_files(folder: Path) -> None:
    """Name the file that is missing, where mlx_lm would only fail somehow."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder}: config.json is missing; is it a model in MLX layout?")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{index}: broken ({error}); download the model again") from error
        missing = sorted(name for name in needed if not (folder / name).is_file())
        if missing:
            raise ModelLoadError(f"{folder}: {', '.join(missing)} missing; download it again")
    elif not any(folder.glob("model*.safetensors")):
        raise ModelLoadError(
            f"{folder}: no model*.safetensors; convert the model with 'mlx_lm.convert'"
        )
    if not any(folder.glob("*token*")):
        raise ModelLoadError(f"{folder}: no tokenizer files (tokenizer.json and the like)")


def _read_weights(
    model: nn.Module, on_progress: ProgressCallback | None, should_stop: Callable[[], bool]
) -> None:
    """Evaluate the lazily loaded weights, slice by slice."""
    weights = [value for _, value in tree_flatten(model.parameters())]
    total = sum(value.nbytes for value in weights)
    done = pending = 0
    batch: list[mx.array] = []
    if on_progress is not None:
        on_progress(Progress("load", 0, total))
    for value in weights:
        batch.append(value)
        pending += value.nbytes
        if pending < _EVAL_SLICE and value is not weights[-1]:
            continue
        if should_stop():
            raise Interrupted
        mx.eval(batch)
        done, pending = done + pending, 0
        batch.clear()
        if on_progress is not None:
            on_progress(Progress("load", done, total))
    if should_stop():
        raise Interrupted


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens of prompt and answer together, by config.json; ``None`` if it names no limit."""
    return _from_config(config, _CONTEXT_KEYS)


def vocab_size(config: dict[str, Any], tokenizer: TokenizerWrapper) -> int:
    """Tokens that the logits cover: more than the tokenizer has, if the matrix is padded."""
    return _from_config(config, ("vocab_size",)) or len(tokenizer)


def other_tokenizer(one: LoadedModel, other: LoadedModel) -> str | None:
    """The difference of two models' tokenizers; ``None`` if they make the same tokens."""
    if one is other:
        return None
    ours, theirs = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours != theirs:
        odd = min(ours.items() ^ theirs.items(), key=lambda pair: pair[1])
        return f"{len(ours)} and {len(theirs)} tokens, and {odd[0]!r} is token {odd[1]} in one only"
    if one.tokenizer.encode(SAMPLE_TEXT) != other.tokenizer.encode(SAMPLE_TEXT):
        return "the same vocabulary, but other tokens for the same text"
    return None


def _from_config(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of ``keys`` that the configuration, or its text part, has."""
    for part in (config, config.get("text_config") or {}):
        for key in keys:
            value = part.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _explain(error: Exception, config: ModelConfig) -> str:
    text = f"{type(error).__name__}: {error}"
    if config.adapter_path is not None and config.adapter_path in text:
        return f"the adapters do not load ({text}); check adapter_path"
    if "trust_remote_code" in text:
        return f"{error} (it is an option of the engine too)"
    if isinstance(error, ValueError) and "not supported" in text:
        return f"{error} The installed mlx-lm is {mlx_lm.__version__}; a newer one may know it."
    return f"the files do not load ({text}); they may be damaged, download the model again"
