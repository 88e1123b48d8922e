"""Benchmarks: one program a question, each against a control measured in the same run.

    python -m benchmarks.overhead          what streaming costs over raw mlx_lm
    python -m benchmarks.cancel_latency    how soon a cancelled request is out of the way
    python -m benchmarks.throughput        tokens/s of 1 to 32 requests at once, against mlx_lm's
    python -m benchmarks.join_stall        how long streams stand still when a long prompt joins
    python -m benchmarks.prompt_cache      time to first token with and without the prompt cache
    python -m benchmarks.remote            what an engine in another process costs and spares
    python -m benchmarks.soak              minutes of everything at once: right tokens, no growth

Run from the root of the repository. Each prints Markdown tables and writes JSON, and a plot
where matplotlib is installed (``pip install mlx-engine[bench]``), into ``benchmarks/results``.
They use a random model of about 1 ms a token, so that what this library adds can be seen at
all: with a real model the same microseconds are a far smaller share.
"""
