"""Where the event loop and the MLX thread meet. MLX is imported when an engine starts.

Its files:

    interface.py       what engines are to their callers
    chat_interface.py  that, as far as it is about prompts and chats
    map_interface.py   and about many of them by one call: map, generate_batch
    base.py            generate, stream_generate, chat, stream_chat, warm, count_tokens, restart
    guided.py          what they say to a guess that is wrong
    sync.py            engines without await
    sync_map.py        many requests by one call, without await
    sync_front.py      the thread on which they are awaited
    typed.py           answers as values of a type: output=, result.parsed
    many.py            many requests by one call: attempts, and retries
    items.py           where they come from
    outcome.py         what has become of one of them
    outcomes.py        and of all, as it comes
    in_process.py      start, run_blocking, shutdown; the one way into MLX
    local.py           those, for models in this process
    simple.py          one request at a time
    batched.py         many at once
    model_holder.py    where the model is
    engine_memory.py   what it has of the memory
    batch_holder.py    a model and the batch of its requests
    late.py            what engines do with MLX, imported when it is first needed
    mlx_work.py        that, in one place
"""
