"""Conversations <-> text: what callers send into a model's chat template, and answers out of its
text. No MLX here.

Its files:

    template.py        the chat template of a model: a conversation -> a prompt
    attempts.py        the ways in which it may take a conversation
    messages.py        what callers send -> what templates take
    probes.py          what a template takes, found out with tiny conversations
    renderer.py        the template itself, or a function in the place of one
    template_names.py  the variables that templates read
    switches.py        those of them that switch reasoning
    offered_tools.py   tools as templates take them, and whether they show
    continuation.py    a last message that is left open
    shown.py           whether all that was sent shows in the prompt
    refusal.py         the error for what a template refuses
"""
