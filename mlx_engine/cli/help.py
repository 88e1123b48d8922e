"""``mlx-engine help``: the guide, a topic at a time."""

from __future__ import annotations

import argparse
import sys

from mlx_engine.cli import guide
from mlx_engine.cli.output import say
from mlx_engine.cli.parser import PROGRAM


def run(args: argparse.Namespace) -> int:
    """Print a topic, or what topics there are; the exit code."""
    topics = guide.topics()
    if args.topic in topics:
        sys.stdout.write(guide.text(args.topic))
        return 0
    if args.topic is not None:
        (topic,) = guide.meant(args.topic)
        say(f"there is no topic {args.topic!r}; this is from {topic!r}")
        sys.stdout.write(guide.part(topic, args.topic))
        return 0
    width = max(map(len, topics))
    for topic in topics:
        sys.stdout.write(f"{topic:<{width}}  {guide.title(topic)}\n")
    sys.stdout.write(f"\n{PROGRAM} help TOPIC shows one.\n")
    return 0
