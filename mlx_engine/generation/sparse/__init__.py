"""SpecPrefill: parts of a long prompt are left out, by what a draft model attends to.

Its files:

    specprefill.py     a sparse prefill, step by step
    scored_prefill.py  with its draft
    importance.py      what a draft attends to
    chunk_choice.py    what to keep
    sparse_cache.py    positions apart from storage
    row_fold.py        chunks as rows of a batch
    attention_tap.py   the hook in mlx-lm's attention
"""
