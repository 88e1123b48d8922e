"""Does SpecPrefill keep what a question needs?

Four haystacks of about 1,000 tokens, in each a number for a city, at another depth, which a
question asks for at the end, as a chat. The demo model (SmolLM2-135M) is its own draft,
since it has no smaller sibling: its scoring costs as much as a full prefill, so there is no time
to be won. Told is whether the fact's tokens are among those kept, whether the number's are, and
whether it is in the answer, full and sparse. Chance would keep as much of the fact as of the
whole. A few cases with a very small model: they show that the path works from end to end, and no
more about quality than that.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import Report, markdown_table
from benchmarks.setting import parse_setting
from mlx_engine import SimpleEngine, SpecPrefill

KEEPS = (0.2, 0.3)
PROMPT = 1000  # tokens
CASES = {"Lisbon": 0.15, "Nairobi": 0.4, "Oslo": 0.65, "Lima": 0.9}  # at this depth
NUMBERS = {"Lisbon": "48213", "Nairobi": "70956", "Oslo": "31684", "Lima": "92507"}


@dataclass(frozen=True, slots=True)
class Needle:
    """One case, in full or with a share kept.

    Attributes:
        keep: ``None`` is in full.
        kept: share of the prompt that the model has read.
        fact: share of the fact's tokens that are among them.
        number: whether all of the number's are.
        answered: whether the number is in the answer.
        answer: what the model said.
    """

    city: str
    depth: float
    prompt: int
    keep: float | None
    kept: float
    fact: float
    number: bool
    answered: bool
    answer: str


def haystack(fact: str, depth: float, sentences: int) -> str:
    """Plain sentences without numbers, and ``fact`` among them."""
    chooser = random.Random(fact)
    who = ("The baker", "A tall sailor", "My neighbour", "The old teacher", "A young painter")
    does = ("walks along", "often talks about", "once described", "never forgets", "paints")
    thing = ("the quiet river", "the market square", "a garden wall", "the harbour", "the forest")
    when = ("in the morning", "when it rains", "after a long day", "in early spring", "on Sundays")
    lines = [
        " ".join(chooser.choice(part) for part in (who, does, thing, when)) + "."
        for _ in range(sentences)
    ]
    lines.insert(round(depth * sentences), fact)
    return " ".join(lines)


@dataclass(frozen=True, slots=True)
class Question:
    """A chat as token ids, and where in it the fact and its number are."""

    prompt: list[int]
    fact: set[int]
    number: set[int]

    @classmethod
    def of(cls, tokenizer: Any, city: str, depth: float, length: int) -> Question:
        """With as many sentences as make the chat long enough. On the MLX thread."""
        fact = f"The secret number of {city} is {NUMBERS[city]}."
        ask = f"What is the secret number of {city}? Answer with the number."
        for sentences in range(5, 400, 5):
            text = f"{haystack(fact, depth, sentences)}\n\n{ask}"
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            coded = tokenizer._tokenizer(
                chat, add_special_tokens=False, return_offsets_mapping=True
            )
            if len(coded["input_ids"]) >= length:
                break
        places = coded["offset_mapping"]

        def tokens_of(part: str) -> set[int]:
            first = chat.index(part)
            last = first + len(part)
            return {i for i, (a, b) in enumerate(places) if a < last and b > first}

        return cls(list(coded["input_ids"]), tokens_of(fact), tokens_of(NUMBERS[city]))


async def find_needles(quick: bool) -> list[Needle]:
    cases, keeps, length = (1, KEEPS[-1:], 300) if quick else (len(CASES), KEEPS, PROMPT)
    found: list[Needle] = []
    strategy = SpecPrefill(threshold=0, report_ranges=True)
    async with SimpleEngine("demo", prefill=strategy, prompt_cache_bytes=0) as engine:
        tokenizer = await engine.run_blocking(lambda: engine._holder.model().tokenizer)
        for city, depth in list(CASES.items())[:cases]:
            asked = await engine.run_blocking(Question.of, tokenizer, city, depth, length)
            for keep in (None, *keeps):
                result = await engine.generate(
                    asked.prompt,
                    max_tokens=16,
                    prefill=None
                    if keep is None
                    else SpecPrefill(keep=keep, threshold=0, report_ranges=True),
                )
                ranges = result.usage.kept_ranges or ((0, len(asked.prompt)),)
                kept = {i for a, b in ranges for i in range(a, b)}
                found.append(
                    Needle(
                        city,
                        depth,
                        len(asked.prompt),
                        keep,
                        len(kept) / len(asked.prompt),
                        len(kept & asked.fact) / len(asked.fact),
                        asked.number <= kept,
                        NUMBERS[city] in result.text.replace(",", ""),
                        result.text.strip(),
                    )
                )
    return found


def needle_table(found: list[Needle]) -> str:
    rows = [
        [
            f"{each.city}, at {each.depth:.0%}",
            str(each.prompt),
            "full" if each.keep is None else f"{each.keep:.0%}",
            f"{each.kept:.0%}",
            f"{each.fact:.0%}",
            "yes" if each.number else "no",
            "yes" if each.answered else "no",
            json.dumps(each.answer[:60]).replace("|", "\\|"),
        ]
        for each in found
    ]
    head = ["fact", "prompt tokens", "keep", "kept of all", "kept of the fact", "number kept"]
    return markdown_table([*head, "number answered", "answer"], rows)


def main() -> None:
    setting = parse_setting("needle", __doc__, repeats=None, layers=None)
    report = Report(setting, "The demo model, its own draft.")
    found = asyncio.run(find_needles(setting.quick))
    report.add(needle_table(found))
    report.finish({"cases": [asdict(each) for each in found]}, None)


if __name__ == "__main__":
    main()
