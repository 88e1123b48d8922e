"""The other side: an engine in this process for those who use it from elsewhere.

Its files:

    child.py              the process of one engine, for its parent
    host.py               one engine for many programs
    acceptor.py           lets them in
    client_connection.py  the connection of one of them
    client_requests.py    a client's requests
    service.py            what the clients of a host share
    round_robin.py        none of them more than its share
    complaints.py         what is logged of those who misbehave
    cache_folder.py       where they keep prompt caches
    heartbeats.py         signs of life of an engine
"""
