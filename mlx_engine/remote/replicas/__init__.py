"""Several engines as one, and those who keep them alive.

Its files:

    manager.py       EngineManager
    supervisor.py    who keeps replicas alive
    restarts.py      when one is started again
    replica.py       one of them
    routing.py       who does which request
    routed.py        a request, on a replica or another one
    waiting_room.py  requests while no replica is up
    tasks.py         tasks and their ends
    in_flight.py     what may be cancelled or aborted
    replica_set.py   all of them
"""
