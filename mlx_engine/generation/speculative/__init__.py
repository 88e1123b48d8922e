"""Speculative decoding: some propose tokens, the model verifies them together.

Its files:

    decoder.py   a cycle: propose, verify, take back
    depth.py     how many to propose
    drafter.py   a draft model
    mtp.py       the model's own head
    rollback.py  taking tokens back
    forward.py   with hidden states, or without
"""
