"""Links to what serves an engine: a child process, a socket, an actor on another machine.

Its files:

    link.py           what they have in common: frames there and back, and an end
    process_link.py   to a child process
    child_process.py  which is started and waited for on a thread
    socket_link.py    to a host
    socket_file.py    at a path
    ray_link.py       to another machine
    relay.py          an actor there that passes frames on
"""
