"""Messages of callers -> what a model's chat template takes.

An ``Entry`` is a message on its way, with the texts of the caller's messages that are in it. What
changes nothing for a template that takes the caller's form is done always; all else only where
the template was seen to refuse or to drop that form.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_engine.chat.probes import Probes

LEADING = ("system", "developer")  # roles of those who instruct
_SHORT = re.compile(r"[A-Za-z0-9]{9}")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BETWEEN = "\n\n"  # of texts that become one message


@dataclass(frozen=True, slots=True)
class Form:
    """Ways that differ from what the traits of the template say, since it refused those.

    Attributes:
        strict: one system message, and no role twice.
        other_arguments: arguments as text where they would be mappings, and the reverse.
    """

    strict: bool = False
    other_arguments: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A caller's message.

    Attributes:
        number: in the conversation.
        role: of its speaker.
        text: its content.
        calls: its calls of tools.
    """

    number: int
    role: str
    text: str
    calls: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"number {self.number} ({self.role!r})"


@dataclass(slots=True)
class Entry:
    """A message for the template, and the caller's messages that are in it."""

    message: dict[str, Any]
    sources: list[Source]

    @property
    def role(self) -> str:
        """Role for the template."""
        return str(self.message["role"])

    @property
    def named(self) -> str:
        """The numbers and roles of the caller's messages."""
        return " and ".join(map(str, self.sources))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Calls of tools."""
        return list(self.message.get("tool_calls") or ())

    @classmethod
    def joined(cls, entries: list[Entry]) -> Entry:
        """One message of several: the first, with the texts of all, and the last one's calls."""
        if len(entries) == 1:
            return entries[0]
        texts = [entry.message["content"] for entry in entries if entry.message["content"]]
        message = {**entries[0].message, "content": _BETWEEN.join(texts)}
        if entries[-1].calls:
            message["tool_calls"] = entries[-1].calls
        return cls(message, [source for entry in entries for source in entry.sources])


@dataclass(slots=True)
class Adapted:
    """A conversation in the form that one template takes.

    Attributes:
        entries: its messages.
        notes: what is in another place than the caller has put it.
    """

    entries: list[Entry]
    notes: list[str] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages for the template."""
        return [entry.message for entry in self.entries]

    def note(self, what: str, why: str) -> None:
        """Tell of a change."""
        self.notes.append(f"messages: {what}, since this model's chat template {why}")


def adapt(
    messages: Iterable[Mapping[str, Any]],
    traits: Probes,
    reasoning: Iterable[str],
    form: Form,
) -> Adapted:
    """Messages in the form that a template takes.

    Args:
        messages: as ``ChatPrompt`` has them.
        traits: of the template.
        reasoning: names under which the template reads what an assistant thought.
        form: what to do in another way than the traits say.
    """
    found = Adapted([_entry(number, message) for number, message in enumerate(messages)])
    _answer_calls(found)
    _place_system(found, traits, form)
    _part_calls(found, traits)
    _merge(found, traits, form)
    _give_reasoning(found, tuple(reasoning), traits)
    _give_arguments(found, traits, form)
    _give_ids(found, traits)
    return found


def _entry(number: int, message: Mapping[str, Any]) -> Entry:
    calls = tuple(call["function"] for call in message.get("tool_calls") or ())
    source = Source(number, str(message["role"]), str(message.get("content") or ""), calls)
    return Entry(dict(message), [source])


def _answer_calls(found: Adapted) -> None:
    """Give results the names of their tools, and the order of their calls."""
    entries = found.entries
    names: dict[str, str] = {}  # of tools, by the ids of calls so far
    for n, entry in enumerate(entries):
        if entry.role == "tool" and "name" not in entry.message:
            name = names.get(entry.message.get("tool_call_id", ""))
            entry.message |= {} if name is None else {"name": name}
        if not entry.calls:
            continue
        names |= {c["id"]: c["function"]["name"] for c in entry.calls if c.get("id")}
        end = _end_of_results(entries, n)
        entries[n + 1 : end] = _ordered(entry.calls, entries[n + 1 : end])


def _end_of_results(entries: list[Entry], call: int) -> int:
    """Number of the first message that is no result behind that of a call."""
    numbers = range(call + 1, len(entries))
    return next((n for n in numbers if entries[n].role != "tool"), len(entries))


def _ordered(calls: list[dict[str, Any]], results: list[Entry]) -> list[Entry]:
    """Results in the order of the calls that they answer; others stay where they are."""
    places = {call["id"]: n for n, call in reversed(list(enumerate(calls))) if call.get("id")}
    free = [n for n, call in enumerate(calls) if not call.get("id")]
    answered: list[tuple[int, Entry]] = []
    slots: list[int] = []
    for slot, entry in enumerate(results):
        given, name = entry.message.get("tool_call_id"), entry.message.get("name")
        place = places.get(given) if given else None
        if place is None and not given and free:  # of old calls have no ids, but names
            named = (n for n in free if calls[n]["function"].get("name") == name)
            place = next(named, free[0] if name is None else None)
        if place is None:
            continue
        if place in free:
            free.remove(place)
        if name is None:
            entry.message["name"] = calls[place]["function"]["name"]
        answered.append((place, entry))
        slots.append(slot)
    ordered = list(results)
    for slot, (_, entry) in zip(slots, sorted(answered, key=lambda each: each[0]), strict=True):
        ordered[slot] = entry
    return ordered


def _place_system(found: Adapted, traits: Probes, form: Form) -> None:
    """Put system messages where the template takes them."""
    entries = found.entries
    for entry in entries:
        if entry.role == "developer" and not traits.knows_developer:
            entry.message["role"] = "system"
    if not any(entry.role in LEADING for entry in entries):
        return
    count = next((n for n, e in enumerate(entries) if e.role not in LEADING), len(entries))
    leading, rest = entries[:count], entries[count:]
    stay: list[Entry] = []
    for entry, before, after in _neighbours(rest):
        if entry.role not in LEADING or (
            not form.strict and traits.takes_system_between(before, after)
        ):
            stay.append(entry)
            continue
        leading.append(entry)
        if traits.takes_system:
            found.note(f"{entry.sources[0]} stands at the beginning", "takes none in the middle")
    if leading and (form.strict or not (traits.takes_systems and traits.takes_system)):
        leading = [Entry.joined(leading)]
    if leading and not traits.takes_system:
        leading, stay = [], _before_user(found, leading[0], stay)
    found.entries = [*leading, *stay]


def _neighbours(entries: list[Entry]) -> Iterator[tuple[Entry, str, str]]:
    """Each message, with the roles of what is before and behind it but system messages."""
    after: list[str] = []
    role = ""
    for entry in reversed(entries):
        after.append(role)
        role = role if entry.role in LEADING else entry.role
    before = ""
    for entry in entries:
        yield entry, before, after.pop()
        before = before if entry.role in LEADING else entry.role


def _before_user(found: Adapted, system: Entry, rest: list[Entry]) -> list[Entry]:
    """Have a system message in the first one of the user."""
    which = system.named
    for n, entry in enumerate(rest):
        if entry.role == "user":
            found.note(f"{which}: stands in {entry.sources[0]}", "takes no system message")
            message = {**entry.message, "content": Entry.joined([system, entry]).message["content"]}
            both = Entry(message, [*system.sources, *entry.sources])
            return [*rest[:n], both, *rest[n + 1 :]]
    found.note(f"{which}: is given as the user's", "takes no system message")
    return [Entry({"role": "user", "content": system.message["content"]}, system.sources), *rest]


def _part_calls(found: Adapted, traits: Probes) -> None:
    """Give each call a message of its own, with its result behind it, where a template wants it."""
    if all(len(entry.calls) < 2 for entry in found.entries) or traits.takes_calls_together:
        return
    parted: list[Entry] = []
    placed: set[int] = set()  # results
    entries = found.entries
    for n, entry in enumerate(entries):
        if n in placed:
            continue
        if len(entry.calls) < 2:
            parted.append(entry)
            continue
        results = range(n + 1, _end_of_results(entries, n))
        for number, call in enumerate(entry.calls):
            bare = {"role": "assistant", "content": ""} if number else entry.message
            text = "" if number else entry.sources[0].text
            source = replace(entry.sources[0], text=text, calls=(call["function"],))
            parted.append(Entry({**bare, "tool_calls": [call]}, [source]))
            given = call.get("id")
            answers = [r for r in results if entries[r].message.get("tool_call_id") == given]
            answers = answers if given else list(results)[number : number + 1]
            parted += [entries[r] for r in answers if r not in placed]
            placed.update(answers)
    found.entries = parted


def _merge(found: Adapted, traits: Probes, form: Form) -> None:
    """Make one message of those of one role in a row, where a template wants turns."""
    groups: list[list[Entry]] = []
    for entry in found.entries:
        last = groups[-1] if groups else []
        if last and _can_merge(last, entry, traits, form):
            why = "takes no two in a row" if last[-1].role == entry.role else "takes none there"
            found.note(f"{entry.sources[0]} stands in {last[0].sources[0]}", why)
            last.append(entry)
        else:
            groups.append([entry])
    found.entries = [Entry.joined(group) for group in groups]


def _can_merge(group: list[Entry], entry: Entry, traits: Probes, form: Form) -> bool:
    role = group[0].role
    if role == entry.role and role in ("user", "assistant"):
        apart = group[-1].calls or (entry.calls and not form.strict)
        return not apart and (form.strict or not traits.takes_twice(role))
    return role == "tool" and entry.role == "user" and not traits.takes_user_after_tool


def _give_reasoning(found: Adapted, names: tuple[str, ...], traits: Probes) -> None:
    """Give it under the names that are read; beside a text and calls only where that is taken."""
    for entry in found.entries:
        text = entry.message.pop("reasoning_content", None)
        if text is None:
            continue
        if entry.calls and entry.message["content"] and not traits.takes_thoughts_with_calls:
            continue
        entry.message.update(dict.fromkeys(names, text))


def _give_arguments(found: Adapted, traits: Probes, form: Form) -> None:
    for entry in found.entries:
        if not entry.calls:
            continue
        as_text = (traits.arguments == "text") is not form.other_arguments
        calls = []
        for call in entry.calls:
            function = call["function"]
            given = function.get("arguments", {})
            if isinstance(given, str) and (form.other_arguments or not traits.takes_broken):
                given = {"arguments": given}  # cut off, or no object: shown as it was
            if as_text and not isinstance(given, str):
                given = json.dumps(given, ensure_ascii=False)
            calls.append({**call, "function": {**function, "arguments": given}})
        entry.message["tool_calls"] = calls


def _give_ids(found: Adapted, traits: Probes) -> None:
    """Give calls and results the ids that a template wants; others keep theirs, or none."""
    calls = [call for entry in found.entries for call in entry.calls]
    if not calls:
        return
    short = traits.wants_short_ids
    if not short and (all(call.get("id") for call in calls) or not traits.wants_ids):
        return
    answers: Iterator[dict[str, Any]] = iter(())
    for number, entry in enumerate(found.entries):
        if entry.calls:
            entry.message["tool_calls"] = [
                {**call, "id": _id(call.get("id"), f"{number}.{n}", short)}
                for n, call in enumerate(entry.calls)
            ]
            answers = iter(entry.message["tool_calls"])
        elif entry.role == "tool":
            call = next(answers, {"id": str(number)})
            given = entry.message.get("tool_call_id") or call["id"]
            entry.message["tool_call_id"] = _id(given, "", short)


def _id(given: str | None, place: str, short: bool) -> str:
    return short_id(given or place) if short or not given else given


def short_id(given: str) -> str:
    """Nine letters and digits for the id of a call, always the same ones."""
    if _SHORT.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.blake2b(given.encode(), digest_size=8).digest(), "big")
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return "".join(digits)
