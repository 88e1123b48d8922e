"""Speculative decoding: a drafter proposes tokens, the model verifies them together.

Its files:

    setup.py    a draft model or an MTP head, tried and ready
    decoder.py  a cycle: propose, verify, take back
    depth.py    how many to propose
    drafter.py  what drafters do, and the one with a draft model
    mtp.py      the one with the model's own head
    forward.py  the model's forward, with hidden states or without
"""
