"""Several engines as one, and those who keep them alive.

Its files:

    manager.py         EngineManager
    supervisor.py      keeps replicas alive
    restarts.py        when one is started again
    replica.py         one of them
    replica_set.py     all of them
    routed.py          a request, on a replica or another one
    routing.py         which replica gets a request
    waiting_room.py    requests while no replica is up
    abortable_work.py  what may be cancelled or aborted
    tasks.py           tasks and their ends
"""
