"""Engines in other processes and on other machines, and those who watch over them.

Its files, a request's way from top to bottom:

    replicas/          several engines as one
    ray_engine.py      RayEngine
    process_engine.py  ProcessEngine
    remote_engine.py   RemoteEngine
    linked.py          the interface of all three
    remote_request.py  a request to one
    client.py          its life, its connection, and what is asked over it
    connection.py      one life of an engine elsewhere, from start to end
    liveness.py        its heartbeats, and the watchdog
    part.py            its part of this process's memory
    node_part.py       that of a node's memory
    calls.py           what has been asked
    health.py          whether its work goes on
    links/             ways to what serves an engine
    wire/              messages, and how they travel
    serving/           the other side
    io_thread.py       the loop in which all this happens
    exits.py           the end of what serves an engine
    signals.py         SIGTERM and Ctrl-C for programs that serve
    totals.py          the counters of several as those of one
"""
