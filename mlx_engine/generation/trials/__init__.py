"""What is tried with a model before it serves.

Its files:

    batch.py        whether a model can do that
    rollback.py     whether a model can
    same_logits.py  whether two ways to compute come to the same
    sparse.py       whether a model can
    warm_up.py      what a model compiles first, at start
"""
