"""Asyncio and threads, and no MLX.

Its files:

    request.py      a request at work, and when it came how far
    scheduler.py    waiting -> running; the one way to the MLX thread
    admission.py    queue limits and counters
    in_flight.py    the registry of what is in flight
    lifecycle.py    states and shutdown
    mlx_thread.py   the MLX thread and the generation lock
    sliced_job.py   work that begins there, and goes on beside it
    turns.py        its turns
    batch_queue.py  who gets the next place in a batch
    ledger.py       who has how much memory
    machine.py      how much there is
    weight_size.py  how much a model's files have
    pressure.py     what is given up when the system is short of it
    reclaim.py      memory had back from engines elsewhere
    work_queue.py   queues: entering, waiting, being cancelled
    work.py         pieces of work: PendingWork, ThreadJob
    drain.py        waiting to the end, whatever happens to whoever waits
    stop.py         checkpoints: where work that should stop does
    wakeup.py       the running event loop, and waking others
    stream.py       GenerationStream: thread -> loop; no MLX from here on
    channel.py      its chunks on their way
    bridge.py       to and from other threads
    loop_thread.py  an event loop on a thread of its own, for those who block
    preparer.py     threads that make prompts into tokens before their turn
    side_work.py    what those threads do besides, without a turn on the MLX thread
    threads.py      starting one, or saying why not
    ranked.py       a heap to be left anywhere
    counters.py     what is counted on the MLX thread
    log.py          what engines do, for whoever listens
    forks.py        what a fork has not got
"""
