"""Whether an engine keeps its promises about cancellation, tried on the machine that it runs on.

Its files:

    check.py       assert_cancellation_safe
    report.py      what it gives
    sweep.py       every operation, in every way, as long as there is time
    plan.py        what is cancelled when
    trial.py       one of these
    operations.py  what an engine does
    endings.py     how a loop ends
    visits.py      who is seen inside MLX
    books.py       what an engine's counters say
    home.py        where it runs
    overseer.py    who sees that it ends
"""
