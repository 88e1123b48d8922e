"""Messages between an engine and those who use it from elsewhere, and how they travel.

Its files:

    messages.py     the messages
    values.py       requests, options and errors, as they travel
    json_values.py  values that JSON has a form for
    options.py      the options of an engine that is made elsewhere
    frames.py       on a byte stream
    outbox.py       messages on their way out
    greeting.py     the first word of a client
    intake.py       what comes from clients, decoded in short steps
    heartbeat.py    the watchdog: when there are too few signs of life
"""
