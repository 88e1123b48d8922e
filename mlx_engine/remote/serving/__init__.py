"""The other side: an engine in this process for those who use it from elsewhere.

Its files:

    session.py       a client's requests
    heart.py         what the engine tells of itself
    host.py          one engine for many programs
    door.py          where they come in
    guest.py         one of them
    round_robin.py   none of them more than its share
    complaints.py    what is logged of those who misbehave
    cache_folder.py  where they keep prompt caches
"""
