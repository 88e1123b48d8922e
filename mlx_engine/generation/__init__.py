"""Requests on the MLX thread: prompt, prefill, decode, text. Synchronous throughout.

Its files:

    request.py           one request at work: its prompt, its tokens, how it ends; no MLX
    prepare.py           a request made ready: its prompt in tokens, its options looked at
    question.py          a question about a prompt, answered
    sequence.py          a request in its KV cache
    runner.py            the model, and what its sequences share: start, prefill_step, store
    single.py            one request by itself: prompt cache -> prefill -> decode
    batch.py             many together, in steps
    prefill_queue.py     one half of a batch: prompts on their way in
    decode_batch.py      the other: sequences that decode
    batch_memory.py      memory that they claim
    preemption.py        those that make room when it is short, and come back
    warm_up.py           what a model compiles first, compiled at start
    strategy_runtime.py  the table of strategies, and those of one engine
    speculative/         several tokens proposed, verified in one forward
    sparse/              SpecPrefill: parts of a prompt left out
    trials/              what is tried with a model before it serves
    memory.py            memory for KV caches: the pool, and for whom it is enough
    single_memory.py     that of a request by itself, claimed before it is needed
    sizing.py            what a model takes, and what of that fits into this machine
    cache/               KV caches, of requests and of earlier prompts
    prefill.py           tokens of a prompt into a KV cache
    tokenize.py          prompts and chats -> token ids
    text_limit.py        text that cannot fit is refused before it is tokenized whole
    chat_places.py       where the turns of a chat begin and end in its prompt
    sampling.py          options -> sampler and logits processors
    reasoning_budget.py  tokens that reasoning may use, and what closes it then
    constraint.py        tokens that may come next, by the grammar of an answer
    sampler.py           log-probabilities -> tokens, all rows at once
    text.py              tokens -> text: characters, stop strings
    string_search.py     the first of several strings in a text that comes in parts
"""
