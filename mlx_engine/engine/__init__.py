"""Where the event loop and the MLX thread meet.

Its files:

    base.py          generate, stream_generate, chat, stream_chat, generate_batch
    local.py         those, for models in this process
    simple.py        one request at a time
    batched.py       many at once
    many.py          many requests by one call
    model_holder.py  where the model is
    batch_holder.py  a model and the batch of its requests
    in_process.py    start, run_blocking, shutdown; the one way into MLX
"""
