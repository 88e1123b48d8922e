"""One request on the MLX thread: prompt, prefill, decode, text. Synchronous throughout.

Its files:

    speculative/          several tokens proposed, verified in one forward
    sparse/               SpecPrefill
    request.py            one request: its prompt, its tokens so far, how it ends
    course.py             its way into the KV cache, slice by slice, whatever its strategies
    single.py             one by itself: prompt cache -> prefill -> decode
    batch.py              many together, in steps
    batch_check.py        whether a model can do that
    prefill_queue.py      one half of a batch: prompts on their way in
    decode_batch.py       the other: rows that decode
    row.py                a request in it
    budget.py             memory for whom
    prompt.py             prompts and chats -> token ids
    template_names.py     what templates read
    prefill.py            the prompt into the KV cache, a cancel point at each chunk
    decode.py             one token after another
    tokenize.py           text -> token ids, and no further than the context goes
    sampling.py           options -> sampler and logits processors
    sampler.py            all rows at once
    text.py               tokens -> text: characters, stop strings, segments, tool calls
    string_search.py      the first of several strings in a text that comes in parts
    kv_cache.py           bounded or quantised caches, and what they take
    prompt_cache.py       KV caches of earlier prompts
    snapshot.py           copies that share memory
    stored_prompt.py      one of the earlier prompts
    chat_places.py        where turns begin and end
    prompt_cache_file.py  the prompt cache on disk
    layer_record.py       a layer of it
    warm_up.py            what a model compiles first, at start
    workspace.py          what the requests of an engine share
    equipment.py          what its strategies need: made and checked at start
    same_logits.py        whether two ways to compute come to the same
"""

import mlx_engine.models  # noqa: F401 - imports mlx_lm in the one way that does no harm
