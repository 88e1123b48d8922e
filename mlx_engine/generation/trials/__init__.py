"""Trials of a model before it serves: wrong results are found at start, not in answers.

Its files:

    batch.py        do rows of a batch get what they get alone?
    rollback.py     can it verify proposals, and take some back?
    sparse.py       can tokens be left out of its prompts?
    mtp_head.py     does its MTP head understand it?
    same_logits.py  whether two ways to compute come to the same
"""
