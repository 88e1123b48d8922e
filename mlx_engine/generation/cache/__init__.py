"""KV caches: of a request, and of earlier ones.

Its files:

    kv_cache.py           bounded or quantised caches, and what they take
    layer_record.py       a layer of it
    prompt_cache.py       KV caches of earlier prompts
    prompt_cache_file.py  the prompt cache on disk
    snapshot.py           copies that share memory
    stored_prompt.py      one of the earlier prompts
"""
