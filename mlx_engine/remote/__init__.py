"""Engines in other processes and on other machines, and those who watch over them.

Its files:

    links/             ways to what serves an engine
    wire/              what is said, and how it travels
    serving/           the other side
    replicas/          several engines as one
    process_engine.py  ProcessEngine
    remote_engine.py   RemoteEngine
    ray_engine.py      RayEngine
    linked.py          what all of them share
    remote_request.py  a request to one
    client.py          the client's side: its life, and what is asked
    connection.py      one life of an engine elsewhere, from start to end, and its watchdog
    calls.py           what has been asked
    io_thread.py       the loop in which all this happens
    health.py          whether its work goes on
    exits.py           what is known of its end
    signals.py         SIGTERM and Ctrl-C for programs that serve
    totals.py          the counters of several as those of one
"""
