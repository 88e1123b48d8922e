"""KV caches: of a request, and of earlier ones. Below all strategies, which share them.

Its files:

    kv_cache.py           bounded or quantised caches, and the bytes that they take
    joint_cache.py        rows that come to a batch's cache, go, and grow
    sparse_cache.py       positions apart from storage
    attention_tap.py      a cache that is asked for its layer's attention
    row_fold.py           a sparse cache that takes chunks of a prompt as rows of a batch
    rollback.py           rejected tokens taken back out
    snapshot.py           copies that share memory
    prompt_cache.py       KV caches of earlier prompts
    stored_prompts.py     all of an engine's, in the ledger of memory
    stored_prompt.py      one of these prompts, and an index of them
    lookup.py             what a lookup among them has found, in words
    prompt_cache_file.py  all of them on disk, in slices
    recorded_prompt.py    one of them there
    array_bytes.py        its arrays as bytes
    entry_file.py         the file's format, and its checksums
    layer_record.py       a layer there
    cached_model.py       a model with its prompt cache
"""
