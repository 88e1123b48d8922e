"""SpecPrefill: parts of a long prompt are left out, by what a draft model attends to.

Its files:

    setup.py         the draft and the model, tried and ready
    importance.py    scoring: the attention that a draft pays to each token
    chunk_choice.py  the chunks to keep
    specprefill.py   prefilling: one prompt, step by step
"""
