"""Names that options have elsewhere, and what to write here: for errors that say so."""

from __future__ import annotations

from collections.abc import Collection

# An option of another library's, a server's or a command's, and that of ours which does the same.
_SAME: dict[str, str] = {
    **dict.fromkeys(("temp", "temperatur", "do_sample", "greedy"), "temperature"),
    **dict.fromkeys(
        (
            "max_new_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "max_gen_len",
            "max_length",
            "maxtokens",
            "n_predict",
            "num_predict",
            "num_tokens",
        ),
        "max_tokens",
    ),
    **dict.fromkeys(
        ("stop_sequences", "stop_sequence", "stop_strings", "stop_words", "stops"), "stop"
    ),
    **dict.fromkeys(("eos_token_id", "eos_token_ids", "stop_ids"), "stop_token_ids"),
    **dict.fromkeys(("top_n_tokens", "top_logprobs", "num_logprobs", "n_probs"), "logprobs"),
    **dict.fromkeys(("random_seed", "random_state"), "seed"),
    **dict.fromkeys(("repeat_penalty", "rep_pen", "repetition_pen"), "repetition_penalty"),
    "presence": "presence_penalty",
    "frequency": "frequency_penalty",
    **dict.fromkeys(("logits_processor", "processors"), "logits_processors"),
    **dict.fromkeys(("enable_thinking", "think", "reasoning", "use_reasoning"), "thinking"),
    **dict.fromkeys(
        ("thinking_budget", "budget_tokens", "reasoning_budget", "max_thinking_tokens"),
        "max_reasoning_tokens",
    ),
    **dict.fromkeys(("functions", "tool", "tool_schemas"), "tools"),
    **dict.fromkeys(("function_call", "tool_config"), "tool_choice"),
    **dict.fromkeys(("template_kwargs", "chat_template_args"), "chat_template_kwargs"),
    **dict.fromkeys(("prefix", "prefill_assistant"), "continue_final_message"),
    **dict.fromkeys(
        ("response_format", "response_model", "json_schema", "guided_json", "schema", "format"),
        "output",
    ),
    **dict.fromkeys(
        (
            "request_timeout",
            "time_limit",
            "max_time",
            "timeout_s",
            "timeout_ms",
            "timeout_seconds",
            "deadline",
        ),
        "timeout",
    ),
    **dict.fromkeys(("queue_timeout", "wait_timeout", "wait"), "max_wait"),
    **dict.fromkeys(("progress", "callback", "progress_callback"), "on_progress"),
    **dict.fromkeys(
        (
            "n_ctx",
            "num_ctx",
            "max_model_len",
            "max_seq_len",
            "context",
            "max_context",
            "context_window",
            "context_size",
        ),
        "context_length",
    ),
    **dict.fromkeys(
        (
            "max_num_seqs",
            "batch",
            "batch_size",
            "n_parallel",
            "num_parallel",
            "max_concurrent_requests",
        ),
        "max_batch_size",
    ),
    **dict.fromkeys(("tool_parser", "tool_call_parser"), "tool_format"),
    "reasoning_parser": "reasoning_format",
    **dict.fromkeys(("lora", "lora_path", "adapter", "adapters", "adapter_file"), "adapter_path"),
    **dict.fromkeys(("draft_model", "draft", "num_draft_tokens", "mtp", "speculative"), "decode"),
    **dict.fromkeys(("n_batch", "prefill_chunk_size", "chunk_size"), "prefill_step_size"),
    **dict.fromkeys(("prompt_cache", "cache_size", "cache_bytes"), "prompt_cache_bytes"),
    **dict.fromkeys(("max_queue", "queue_size", "max_waiting"), "queue_limit"),
    **dict.fromkeys(
        ("max_concurrency", "workers", "max_workers", "num_workers", "n_jobs"), "concurrency"
    ),
    **dict.fromkeys(("order", "in_order", "keep_order", "preserve_order"), "ordered"),
    **dict.fromkeys(("max_retries", "retry"), "retries"),
    **dict.fromkeys(
        ("delay", "latency", "pace", "step_seconds", "token_delay", "token_seconds"),
        "seconds_per_token",
    ),
}

# How that is written, where its name alone does not say it.
_WRITTEN = {
    "temperature": "temperature=0.7, or 0 for greedy",
    "thinking": "thinking=True or False",
    "output": "output=A_CLASS_WITH_FIELDS or a JSON schema; for any JSON, constraint=AnyJSON()",
    "timeout": "timeout=SECONDS",
    "ordered": "ordered=True; without it outcomes come as they are completed",
    "max_wait": "max_wait=SECONDS",
    "logprobs": "logprobs=N, for the N best at each place",
    "tools": "tools=[...], as in OpenAI's API",
    "decode": "decode=DraftModel(...) or MTP()",
    "stop": 'stop=["..."]',
}

# What is done here in another way than by an option.
_INSTEAD: dict[str, str] = {
    "stream": "call stream_generate() or stream_chat() instead, and read it with 'async for'",
    **dict.fromkeys(
        ("n", "best_of", "num_return_sequences"),
        "a call gives one answer: for several, engine.map([prompt] * n, temperature=0.7)",
    ),
    **dict.fromkeys(
        ("system", "system_prompt", "instructions"),
        'it is a message: chat([{"role": "system", "content": ...}, ...])',
    ),
    **dict.fromkeys(
        ("model", "model_name", "model_id", "model_path"),
        "an engine has one model, its first argument: SimpleEngine(model)",
    ),
    **dict.fromkeys(
        ("messages", "conversation", "history", "chat_history"),
        "a conversation goes to chat(messages) or stream_chat(messages)",
    ),
    **dict.fromkeys(("prompt", "prompts"), "it is the first argument, without a name"),
    **dict.fromkeys(
        ("sampler", "num_beams", "length_penalty", "typical_p", "mirostat"),
        "tokens are chosen by temperature, top_p, top_k, min_p and logits_processors",
    ),
    **dict.fromkeys(
        ("min_tokens", "min_new_tokens", "min_length"),
        "no answer has a least length; with ignore_eos=True it goes on until max_tokens",
    ),
    **dict.fromkeys(
        ("max_prompt_tokens", "truncate", "truncation"),
        "no prompt is cut: count_tokens() tells how long it is",
    ),
    **dict.fromkeys(
        ("echo", "return_full_text"), "result.text is the answer alone: put the prompt before it"
    ),
    **dict.fromkeys(("image", "images", "audio", "video"), "a prompt is text only"),
    "guided_regex": "write constraint=Regex(...)",
    "regex": "write constraint=Regex(...)",
    **dict.fromkeys(("guided_choice", "choices"), "write constraint=Choice([...])"),
    **dict.fromkeys(("guided_grammar", "grammar"), "write constraint=Grammar(...)"),
    **dict.fromkeys(("json_mode", "json", "as_json"), "write constraint=AnyJSON()"),
    "reasoning_effort": (
        "write thinking=True or False, max_reasoning_tokens=N, or, where the model's template "
        'knows it, chat_template_kwargs={"reasoning_effort": ...}'
    ),
    **dict.fromkeys(
        ("add_generation_prompt", "continue_last"), "see continue_final_message, of chat()"
    ),
    **dict.fromkeys(
        ("on_token", "on_chunk", "streamer", "token_callback"),
        "read stream_generate() or stream_chat() with 'async for'",
    ),
    **dict.fromkeys(
        ("cache", "cache_prompt", "keep_alive", "use_cache"),
        "earlier prompts are kept by themselves; see prompt_cache_bytes, of the engine, and warm()",
    ),
    **dict.fromkeys(
        ("device", "n_gpu_layers", "gpu_layers", "device_map"),
        "MLX chooses the device: mx.set_default_device() before the start",
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "quantization", "load_in_4bit"),
        "the model's files say that: convert it with mlx_lm.convert",
    ),
    **dict.fromkeys(("token", "hf_token", "api_key"), "log in with 'hf auth login'"),
    **dict.fromkeys(
        ("cache_dir", "download_dir", "local_files_only", "offline"),
        "Hugging Face's own variables say that: HF_HOME, HF_HUB_OFFLINE=1",
    ),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_path", "tokenizer_config"), "the model's own folder has it"
    ),
    **dict.fromkeys(
        ("engine", "kind", "engine_type"), "write ProcessEngine(model, engine='batched')"
    ),
    **dict.fromkeys(("replicas", "num_replicas"), "write EngineManager(model, replicas=N)"),
    **dict.fromkeys(
        ("cancel_token", "cancel_event", "abort_signal"),
        "cancel the task that waits for it, or call stream.cancel()",
    ),
    **dict.fromkeys(
        ("backoff", "retry_delay"), "retries=N of map() waits before each, longer each time"
    ),
    "return_exceptions": "errors are values in map() and generate_batch(): see outcome.error",
    **dict.fromkeys(
        ("on_result", "on_outcome", "as_completed"), "write 'async for outcome in engine.map(...)'"
    ),
    **dict.fromkeys(
        ("request_id", "id", "custom_id", "ids"),
        "of many requests each has an id: engine.map({id: prompt, ...})",
    ),
    **dict.fromkeys(
        ("chat_template", "template"),
        "the model's own files have it: put yours into a copy of its folder, as "
        "chat_template.jinja",
    ),
    **dict.fromkeys(
        ("restart", "auto_restart", "restart_policy", "max_restarts"),
        "EngineManager(model, replicas=1, restart=RestartPolicy(...)) starts a process again; "
        "otherwise, await engine.restart()",
    ),
    **dict.fromkeys(
        ("responses", "replies", "outputs"),
        "answers are the first argument, without a name; one for each request in order is "
        "FakeEngine.script(...)",
    ),
    "verbose": 'see result.timings, and logging.getLogger("mlx_engine")',
}

# Options of ours, by what they are of.
OF_CHATS = frozenset(
    (
        "chat_template_kwargs",
        "continue_final_message",
        "max_reasoning_tokens",
        "parallel_tool_calls",
        "thinking",
        "tool_choice",
        "tools",
    )
)
OF_REQUESTS = frozenset(("output", "priority", "timeout"))
OF_SAMPLING = frozenset(
    (
        "constraint",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "logits_processors",
        "logprobs",
        "max_tokens",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
        "xtc_probability",
        "xtc_threshold",
    )
)
OF_MAP = frozenset(("concurrency", "ordered", "retries"))
OF_ENGINES = frozenset(
    (
        "adapter_path",
        "context_length",
        "kv_bits",
        "kv_group_size",
        "limits",
        "max_kv_size",
        "memory",
        "prefill_step_size",
        "prompt_cache_bytes",
        "quantized_kv_start",
        "queue_limit",
        "reasoning_format",
        "revision",
        "tool_format",
        "trust_remote_code",
    )
)
OF_BATCHED = frozenset(("kv_cache_memory_bytes", "max_batch_size", "max_decode_pause_ms"))

_HOMES = (
    (OF_CHATS, "{} is an option of chat() and stream_chat()"),
    (OF_REQUESTS | OF_SAMPLING, "{} is an option of each request: generate(..., {}=...)"),
    (OF_MAP, "{} is an option of map()"),
    (OF_BATCHED, "{} is an option of the engine: BatchedEngine(model, {}=...)"),
    (OF_ENGINES, "{} is an option of the engine: SimpleEngine(model, {}=...)"),
)


# All that an option may be called, here or elsewhere.
NAMES = frozenset().union(_SAME, _INSTEAD, *(options for options, _ in _HOMES))


def same(name: str) -> str:
    """An option's name here, out of the one that it has elsewhere; others are left as they are."""
    return _SAME.get(name, name)


def advice(name: str, known: Collection[str]) -> str | None:
    """Advice on what to write instead of an option that does not exist; ``None`` if there is none.

    Args:
        name: as its caller has it.
        known: the options that there are in this place.
    """
    small = name.lower().replace("-", "_")
    if small in known:
        return f"write {small}=..."
    ours = same(small)
    if ours in known:
        return f"write {_WRITTEN.get(ours, f'{ours}=...')}"
    if small in _INSTEAD:
        return _INSTEAD[small]
    for options, said in _HOMES:
        if ours in options:
            return said.format(ours, ours)
    return None
