"""Grammars as callers write them: what can be enforced, and the text that a compiler takes.

Its files:

    json_schema.py     a JSON schema -> one that is enforced as it stands, or the place that is not
    plain_keywords.py  its keywords without schemas in them
    keywords.py        those that say nothing, and those not enforced
    json_values.py     what is copied, and constants that can be written
    overlap.py         whether two schemas may allow the same value
    endless.py         schemas that nothing finite satisfies
    formats.py         formats of strings, as regular expressions
    lark.py            grammars in Lark, as far as they are looked at
    pattern.py         regular expressions, and how much text they demand
    problem.py         what is wrong, and where
"""
