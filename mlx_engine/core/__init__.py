"""Asyncio and threads, and no MLX.

Its files:

    bridge.py       to and from other threads
    counters.py     what is counted on the MLX thread
    drain.py        waiting to the end, whatever happens to whoever waits
    event_loop.py   asyncio's, or an error that says so
    forks.py        what a fork has not got
    in_flight.py    the registry of what is in flight
    lifecycle.py    states and shutdown
    log.py          what engines do, for whoever listens
    mlx_thread.py   the MLX thread and the generation lock
    preparer.py     threads that make prompts into tokens before their turn
    ranked.py       a heap to be left anywhere
    scheduler.py    waiting -> running; the one way to the MLX thread
    stop.py         checkpoints: where work that should stop does
    stream.py       GenerationStream: thread -> loop; no MLX from here on
    threads.py      starting one, or saying why not
    timer.py        when a request came how far
    wakeup.py       waking event loops from other threads
    work.py         pieces of work: PendingWork, ThreadJob
    work_queue.py   queues: entering, waiting, being cancelled
    admission.py    queue limits and counters
    batch_queue.py  who gets the next place in a batch
    request.py      a request at work
"""
