"""The other side: an engine in this process for those who use it from elsewhere.

Its files:

    host.py               one engine for many programs
    round_robin.py        none of them more than its share
    complaints.py         what is logged of those who misbehave
    cache_folder.py       where they keep prompt caches
    acceptor.py           where they come in
    child.py              the other side: the process of one engine
    client_connection.py  one of them
    client_requests.py    a client's requests
    heartbeats.py         what the engine tells of itself
"""
