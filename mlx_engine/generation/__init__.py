"""One request on the MLX thread: prompt, prefill, decode, text. Synchronous throughout.

Its files:

    speculative/       several tokens proposed, verified in one forward
    sparse/            SpecPrefill
    request.py         one request: its prompt, its tokens so far, how it ends; no MLX
    prepare.py         made ready for its work: tokens, options
    course.py          its way into the KV cache, slice by slice, whatever its strategies
    single.py          one by itself: prompt cache -> prefill -> decode
    batch.py           many together, in steps
    prefill_queue.py   one half of a batch: prompts on their way in
    decode_batch.py    the other: rows that decode
    budget.py          memory for whom
    prompt.py          prompts and chats -> token ids
    template_names.py  what templates read
    prefill.py         the prompt into the KV cache, a cancel point at each chunk
    decode.py          one token after another
    tokenize.py        text -> token ids, and no further than the context goes
    sampling.py        options -> sampler and logits processors
    sampler.py         all rows at once
    text.py            tokens -> text: characters, stop strings, segments, tool calls
    string_search.py   the first of several strings in a text that comes in parts
    chat_places.py     where turns begin and end
    equipment.py       what its strategies need: made and checked at start
    cache/             KV caches, of requests and of earlier prompts
    runner.py          what the requests of an engine share
    sequence.py        a request in it
    trials/            what is tried with a model before it serves
"""
