"""What is said between an engine and those who use it from elsewhere, and how it travels.

Its files:

    messages.py     what is said
    values.py       requests, options and errors, as they travel
    json_values.py  values that JSON has a form for
    options.py      the options of an engine that is made elsewhere
    frames.py       on a byte stream
    outbox.py       messages on their way out
    greeting.py     what strangers say first
    intake.py       and then, in short steps
    heartbeat.py    signs of life, and when there are too few
"""
