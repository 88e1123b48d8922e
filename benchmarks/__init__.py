"""Benchmarks: one program a question, each against a control measured in the same run.

    python -m benchmarks                   all of them, quickly; --full takes two hours
    python -m benchmarks.overhead          what streaming costs over raw mlx_lm
    python -m benchmarks.chat_streams      what taking a chat's answer apart costs
    python -m benchmarks.throughput        tokens/s of 1 to 32 requests at once, against mlx_lm's
    python -m benchmarks.cancel_latency    how soon a cancelled request is out of the way
    python -m benchmarks.timeline          one cancellation, moment by moment
    python -m benchmarks.join_stall        how long streams stand still when a long prompt joins
    python -m benchmarks.memory            requests without limits, on memory for a few of them
    python -m benchmarks.newcomers         and while a chat is tokenized, or options are new
    python -m benchmarks.outsiders         and because of what one client of a host sends
    python -m benchmarks.prompt_cache      time to first token with and without the prompt cache
    python -m benchmarks.first_token       the same by prompt length, with SpecPrefill
    python -m benchmarks.specprefill       SpecPrefill by the share that is kept
    python -m benchmarks.needle            what SpecPrefill keeps, with the demo model
    python -m benchmarks.decode            tokens/s with a draft model, and with MTP
    python -m benchmarks.constrained       what constraints cost: masks, and compiling them
    python -m benchmarks.forced_text       what is saved where a grammar forces text
    python -m benchmarks.remote            what an engine in another process costs and spares
    python -m benchmarks.server            what HTTP costs, against in process and mlx_lm.server
    python -m benchmarks.soak              minutes of everything at once: right tokens, no growth

Run from the root of the repository. Each prints Markdown tables and writes JSON, and a picture
where matplotlib is installed (``pip install '.[bench]'``), into ``benchmarks/results``,
and with ``--quick`` into ``benchmarks/results/quick``, so that a quick run never takes the place
of a result. Most use a random model of about 1 ms a token, so that what this library adds can be
seen at all: with a real model the same microseconds are a far smaller share.
"""

import os

# Nothing here needs PyTorch, or to be told so, also by the processes that are started.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# In the order in which ``python -m benchmarks`` runs them.
NAMES = (
    "overhead",
    "chat_streams",
    "throughput",
    "cancel_latency",
    "timeline",
    "join_stall",
    "memory",
    "newcomers",
    "outsiders",
    "prompt_cache",
    "first_token",
    "specprefill",
    "needle",
    "decode",
    "constrained",
    "forced_text",
    "remote",
    "server",
    "soak",
)
