"""Where the event loop and the MLX thread meet. No MLX here but where the model is.

Its files:

    base.py          generate, stream_generate, chat, stream_chat, generate_batch
    local.py         those, for models in this process
    life.py          start, run_blocking, shutdown; the one way into MLX
    simple.py        one request at a time
    batched.py       many at once
    bursts.py        turns that they share
    many.py          many requests by one call
    producer.py      a request as a stream sees it
    late.py          imports MLX when the first engine starts
    model_holder.py  where the model is, and all that is done with it
"""
