"""Whether an engine keeps its promises about cancellation, tried on the machine that it runs on.

Its files:

    check.py           assert_cancellation_safe
    report.py          what it gives
    sweep.py           every operation, in every way, as long as there is time
    plan.py            what is cancelled when
    trial.py           one of these
    checked_engine.py  the engine, and what must be true of its answers
    operations.py      the table of what an engine does
    ways.py            in which code is cancelled
    stepped_loop.py    an event loop of single steps
    loop_thread.py     an event loop that stays
    overlap_check.py   no two are inside MLX at once
    stats_check.py     each request is counted once
    timeouts.py        everything comes to its end
    fault.py           a promise that is not kept
"""
