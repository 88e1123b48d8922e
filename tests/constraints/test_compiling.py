"""Compiling: clear errors with their place, bounds, and tokenizers of every kind."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers

from mlx_engine import AnyJSON, Choice, Constraint, Grammar, InvalidRequest, JSONSchema, Regex
from mlx_engine.core.stop import Interrupted, stoppable
from mlx_engine.models import grammar_compiler as grammars
from mlx_engine.models.grammar_compiler import Grammars
from tests.constraints.walks import answer, bits
from tests.generation.tokenizers import KINDS, SENTENCEPIECE, fast
from tests.tiny import make_tokenizer

TOKENIZER = TokenizerWrapper(make_tokenizer())
SIZE = len(TOKENIZER._tokenizer)
END = 257
S = {"type": "string"}


@pytest.fixture(scope="module")
def compiler() -> Grammars:
    return Grammars(TOKENIZER, SIZE, frozenset({END}))


def compiled(compiler: Grammars, constraint: Constraint) -> LLMatcher:
    return compiler.compile(f"start: {constraint.rule}").matcher()


def accepts(matcher: LLMatcher, text: str) -> bool:
    """Whether a text is a whole answer."""
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    whole = matcher.validate_tokens([*tokens, END]) == len(tokens) + 1
    matcher.reset()
    return whole


# A constraint, texts that it allows, and texts that it does not.
MEANINGS: list[tuple[Constraint, list[str], list[str]]] = [
    (Regex(r"a/b\/c\n\"é日"), ['a/b/c\n"é日'], ["a/b/c\n", "xa/b"]),
    (Regex("a\nb"), ["a\nb"], ["a\\nb"]),
    (Regex("^a|b$"), ["a", "b"], ["ab", "ax"]),
    (Regex("(?i)yes"), ["YES", "yEs"], ["no"]),
    (Choice(["a.b", "(", "/", "é\n", '"', "\\"]), ["a.b", "(", "/", "é\n", '"', "\\"], ["axb", ""]),
    (Choice(["yes", "yesterday"]), ["yes", "yesterday"], ["yester", "yesyes"]),
    (AnyJSON(), ["{}", '{"a": [1, null]}'], ["[]", "1", '{"a":1}', " {}"]),
    (Grammar('start: "(" start ")" | "x" // }'), ["x", "((x))"], ["(x", "()"]),
    (Grammar('%llguidance {}\nstart: W\nW: /[a-z]+/ "!"{1,2}\n'), ["ab!", "a!!"], ["a", "a!!!"]),
    (Grammar('start: %json {"type": "object"} "."'), ['{"a": 1}.'], ['{"\\u0061": 1}.']),
    (JSONSchema(S), ['"a"', '"\\n\\""', '"é"'], ['"\\u0061"', '"a', "'a'", '"\n"', ' "a"']),
    # A name that is written in another way would be another one's.
    (
        JSONSchema({"properties": {"a": {"type": "integer"}}, "type": "object"}),
        ['{"a": 1}', '{"a": 1, "b": "x"}'],
        ['{"\\u0061": "x"}', '{"a": "x"}', '{"a": 1, "a": "x"}', '{"a":1}', '{ "a": 1}'],
    ),
    (
        JSONSchema({"propertyNames": {"type": "string"}, "additionalProperties": {"type": "null"}}),
        ['{"x": null}', "3"],
        ['{"x": 1}'],
    ),
    (
        JSONSchema({"type": "object", "propertyNames": {"pattern": "^a"}, "maxProperties": 2}),
        ['{"ab": 3}', "{}"],
        ['{"b": 3}'],
    ),
    (
        JSONSchema(
            {
                "type": "object",
                "propertyNames": {"enum": ["a", "b"]},
                "additionalProperties": {"type": "integer"},
            }
        ),
        ['{"a": 1, "b": 2}', '{"b": 2}', "{}"],
        ['{"c": 1}', '{"a": "x"}'],
    ),
    (
        JSONSchema({"type": "object", "propertyNames": {"maxLength": 2, "minLength": 1}}),
        ['{"ab": 3}'],
        ['{"": 3}', '{"abc": 3}'],
    ),
    (
        JSONSchema({"type": "object", "properties": {"a": S}, "patternProperties": {"^a": {}}}),
        ['{"a": "x", "ab": 1}'],
        ['{"a": 1}'],
    ),
    (
        JSONSchema({"type": "array", "items": [S, {"type": "null"}], "additionalItems": False}),
        ['["a", null]', "[]"],
        ["[null]", '["a", null, 1]'],
    ),
    (JSONSchema({"type": "integer", "format": "int32"}), ["-2147483648"], ["2147483648"]),
    (
        JSONSchema({"type": "object", "patternProperties": {r"^\w$": S}}),
        ['{"é": "x", "-": 1}'],
        ['{"é": 1}', '{"a": 1}'],
    ),
    (JSONSchema({"exclusiveMinimum": 2, "maximum": 2.5, "type": "number"}), ["2.5"], ["2", "2.0"]),
    (JSONSchema({"minimum": -0.5, "exclusiveMaximum": 0, "type": "number"}), ["-0.5"], ["-0"]),
    (JSONSchema({"exclusiveMinimum": 2, "minimum": 1, "type": "integer"}), ["3"], ["1", "2"]),
    (JSONSchema({"type": "string", "pattern": "^[[a&&b~]$"}), ['"["', '"&"', '"b"'], ['"c"']),
    (JSONSchema({"type": "string", "pattern": r"^\W\D$"}), ['"- "'], ['"é-"', '"-٣"']),
    (JSONSchema({"type": "string", "pattern": "^a*$", "maxLength": 2}), ['""', '"aa"'], ['"aaa"']),
    (JSONSchema({"type": "string", "pattern": "^a*$", "minLength": 1}), ['"a"'], ['""']),
    (JSONSchema({"$ref": "#/$defs/a~1b/items", "$defs": {"a/b": {"items": S}}}), ['"x"'], ["1"]),
    (JSONSchema({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "null"}}}), ["null"], ["1"]),
    (JSONSchema({"x-guidance": {"lenient": True}, "type": "null"}), ["null"], ["1"]),
]


@pytest.mark.parametrize(("constraint", "good", "bad"), MEANINGS, ids=lambda v: f"{v!s:.50}")
def test_what_a_constraint_allows(
    compiler: Grammars, constraint: Constraint, good: list[str], bad: list[str]
) -> None:
    matcher = compiled(compiler, constraint)
    assert [text for text in good if not accepts(matcher, text)] == []
    assert [text for text in bad if accepts(matcher, text)] == []


DATES = [
    ("date", ["2024-02-29", "2000-02-29", "0001-01-01", "1999-12-31"]),
    ("date", []),
    ("time", ["00:00:00Z", "23:59:59.123+01:30"]),
    ("ipv6", ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "1::8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8"]),
    ("ipv4", ["0.0.0.0", "255.249.10.1"]),
    ("uri", ["http://a.b/c?d#e", "mailto:a@b.c", "urn:x:y"]),
    ("duration", ["P1Y2M3DT4H5M6S", "P2W", "PT1M", "P1M"]),
]
NO_DATES = [
    ("date", ["2023-02-29", "1900-02-29", "0000-01-01", "2024-13-01", "2024-04-31", "2024-1-1"]),
    ("time", ["24:00:00Z", "23:59:60Z", "00:00:00", "00:00Z"]),
    ("date-time", ["2023-02-29T00:00:00Z", "2024-02-29 00:00:00Z"]),
    ("ipv6", ["1", "1:2", "1::2::3", "1:2:3:4:5:6:7:8:9", "12345::"]),
    ("ipv4", ["256.0.0.1", "01.0.0.1", "1.1.1"]),
    ("duration", ["P", "PT", "P1Y3D", "1Y"]),
    ("hostname", ["-a", "a-", "a..b", "", "a" * 64]),
]


@pytest.mark.parametrize(("kind", "texts"), DATES)
def test_what_a_format_allows(compiler: Grammars, kind: str, texts: list[str]) -> None:
    matcher = compiled(compiler, JSONSchema({**S, "format": kind}))
    assert [text for text in texts if not accepts(matcher, f'"{text}"')] == []


@pytest.mark.parametrize(("kind", "texts"), NO_DATES)
def test_what_a_format_does_not_allow(compiler: Grammars, kind: str, texts: list[str]) -> None:
    matcher = compiled(compiler, JSONSchema({**S, "format": kind}))
    assert [text for text in texts if accepts(matcher, f'"{text}"')] == []


def within(schema: Any) -> dict[str, Any]:
    """A schema in the depth of another."""
    return {"type": "object", "properties": {"a": {"type": "array", "items": schema}}}


# What only the compiler can tell, and a part of what it says.
ERRORS: list[tuple[Constraint, str]] = [
    (JSONSchema(within({**S, "pattern": "("})), "properties.a.items: .*unclosed group"),
    (JSONSchema(within({**S, "pattern": "a$b"})), "properties.a.items: .*a\\$b"),
    (
        JSONSchema({"$defs": {"x": {**S, "pattern": "[z-a]"}}, "items": {"$ref": "#/$defs/x"}}),
        r"\$defs.x: .*invalid character class range",
    ),
    (JSONSchema({"type": "string", "const": 1}), "nothing satisfies it: incompatible types"),
    (
        JSONSchema({"type": "integer", "minimum": 0.2, "maximum": 0.7}),
        "nothing satisfies it: integer interval",
    ),
    (
        JSONSchema({"allOf": [{**S, "pattern": "^a$"}, {"pattern": "^b$"}]}),
        "nothing satisfies it: Regex is empty",
    ),
    (
        JSONSchema({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 2}]}),
        "nothing satisfies it: minimum",
    ),
    (
        JSONSchema({"patternProperties": {"^a": {}, "a$": {}}}),
        "not disjoint",
    ),
    (
        JSONSchema({"properties": {"a": {}, "b": {}}, "minProperties": 1, "maxProperties": 2}),
        "min/maxProperties",
    ),
    (Regex("("), "unclosed group"),
    (Regex("[z-a]"), "invalid character class range"),
    (Regex("a**{"), "repetition"),
    (Grammar('start: "x" b'), 'unknown name: "b", at \'start: "x" b\''),
    (Grammar('start: x\nx: "x" |\n  "b" "'), 'lexer error, at \'"b" "\''),
    (Grammar("start: x\nx: /(/"), "unclosed group.*at 'x: /\\(/'"),
    (Grammar("start: X\nX: Y\nY: X"), "circular reference"),
    (Grammar("start: @other"), "other"),
    (Grammar("start: <nope>"), "unknown special token"),
]


@pytest.mark.parametrize(("constraint", "says"), ERRORS, ids=[each for _, each in ERRORS])
def test_what_does_not_compile_is_refused_with_its_place(
    compiler: Grammars, constraint: Constraint, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"^tools: .*{says}") as caught:
        compiler.compile(f"start: {constraint.rule}", "tools")
    text = str(caught.value)
    assert len(text) < 500
    assert "\n" not in text
    assert "x-guidance" not in text


PRIMES = (2, 3, 5, 7, 11, 13, 17)


def many(count: int, schema: Any = S) -> dict[str, Any]:
    return {f"property_{n}": schema for n in range(count)}


def product(parts: int, choices: int) -> dict[str, Any]:
    each = [{"required": [f"k{n}"], "properties": {f"k{n}": S}} for n in range(parts * choices)]
    groups = [{"anyOf": each[n::parts]} for n in range(parts)]
    return {"type": "object", "allOf": groups}


# What would take seconds, minutes, or all memory.
BOMBS: dict[str, Any] = {
    "a schema of 2 MB": lambda: JSONSchema({"properties": many(80_000)}),
    "a text of 2 MB": lambda: JSONSchema(json.dumps({"properties": many(60_000)})),
    "values of 2 MB": lambda: JSONSchema({"enum": [f"value {n:030}" for n in range(60_000)]}),
    "10,000 alternatives": lambda: JSONSchema({"anyOf": [{"const": n} for n in range(10_000)]}),
    "10,000 alternatives in Lark": lambda: Grammar(
        "start: " + " | ".join(f'"alternative {n}"' for n in range(10_000))
    ),
    "counts in counts": lambda: Regex("(a{1000}){1000}"),
    "a text that must come": lambda: Regex("a{0,5000}a{5000}"),
    "terminals that demand": lambda: Grammar('start: A\nA: ("a"?){3000} "a"{3000}'),
    "terminals at once": lambda: Grammar(
        "start: A\nA: " + " & ".join(f"/(.{{{prime}}})*/" for prime in PRIMES)
    ),
    "patterns at once": lambda: JSONSchema(
        {"allOf": [{**S, "pattern": f"^(.{{{prime}}})*$"} for prime in PRIMES]}
    ),
    "choices at once": lambda: JSONSchema(product(12, 3)),
    "multiples at once": lambda: JSONSchema(
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (997, 991, 983)]}
    ),
    "multiples, many": lambda: JSONSchema(
        {"properties": many(900, {"type": "integer", "multipleOf": 997})}
    ),
    "patterns of names": lambda: JSONSchema(
        {"patternProperties": {f"^a{n}": True for n in range(300)}}
    ),
    "items, many": lambda: JSONSchema({"type": "array", "maxItems": 10**9}),
    "length, large": lambda: JSONSchema({**S, "pattern": "^(ab?)*$", "minLength": 100_000}),
    "optional, many": lambda: JSONSchema({"properties": many(900)}),
    "brackets": lambda: Grammar("start: " + "(" * 5_000 + '"a"' + ")" * 5_000),
    "groups": lambda: Regex("(" * 2_000 + ")" * 2_000),
    "oneOf, many": lambda: JSONSchema({"oneOf": [{"const": n} for n in range(3_000)]}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(compiler: Grammars, bomb: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^constraint: "):
        compiled(compiler, BOMBS[bomb]())


# What looks like one, and costs nothing.
HARMLESS: list[Constraint] = [
    Regex("(a|a)*"),
    Regex("((a*)*)*b"),
    Regex("(x+x+)+y"),
    Regex(".{0,100000}"),
    Regex("[ab]*a[ab]{60}c"),
    JSONSchema({**S, "minLength": 100_000, "maxLength": 1_000_000}),
    JSONSchema({"type": "array", "items": {"type": "array", "maxItems": 4000}, "maxItems": 4000}),
    JSONSchema({**S, "pattern": r"^\w+([.-]?\w+)*@\w+([.-]?\w+)*(\.\w{2,})+$", "maxLength": 200}),
    JSONSchema(
        {
            "$defs": {
                **{f"{n}": {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(30)},
                "30": {"type": "null"},
            },
            "$ref": "#/$defs/0",
        }
    ),
    Choice([f"choice number {n}" for n in range(1_000)]),
    JSONSchema({"type": "object", "properties": many(300)}),
]


@pytest.mark.parametrize("constraint", HARMLESS, ids=lambda value: f"{value!s:.60}")
def test_what_only_looks_like_a_bomb_is_followed(
    compiler: Grammars, constraint: Constraint
) -> None:
    matcher = compiled(compiler, constraint)
    rng = random.Random(1)
    for _ in range(30):
        allowed = [token for token in bits(matcher, SIZE) if token != END]
        if not allowed:
            break
        assert matcher.consume_token(rng.choice(allowed))
    assert not matcher.is_error()


def test_what_passes_a_limit_later_is_an_error_of_its_matcher(compiler: Grammars) -> None:
    matcher = compiled(compiler, Grammar('start: (("a"|"b"){900} "c"?){900} | "x" ("a"{900}){900}'))
    matcher.consume_tokens(TOKENIZER.encode("x", add_special_tokens=False))
    for _ in range(1000):
        if matcher.is_error():
            break
        allowed = bits(matcher, SIZE)
        if allowed:
            matcher.consume_token(allowed[0])
    assert matcher.is_error()
    assert "aaaa" not in matcher.get_error()  # the answer is no one's but the caller's


def test_a_grammar_is_compiled_once(compiler: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler.compile("start: /once/")
    assert compiler.compile("start: /once/") is made
    monkeypatch.setattr(grammars, "KEPT", 2)
    kept = [compiler.compile(f"start: /{n}x/") for n in range(3)]
    assert compiler.compile("start: /2x/") is kept[2]
    assert compiler.compile("start: /1x/") is kept[1]
    assert compiler.compile("start: /0x/") is not kept[0]
    assert compiler.compile("start: /1x/") is kept[1]  # looked at since
    monkeypatch.setattr(grammars, "KEPT_CHARACTERS", 20)
    compiler.compile("start: /long/")
    assert compiler.compile("start: /1x/") is not kept[1]


def test_matchers_of_a_grammar_are_apart(compiler: Grammars) -> None:
    made = compiler.compile("start: /ab|ba/")
    one, other = made.matcher(), made.matcher()
    a, b = (TOKENIZER.encode(text, add_special_tokens=False) for text in "ab")
    assert one.consume_tokens(a)
    assert other.consume_tokens(b)
    assert bits(one, SIZE) == b
    assert bits(other, SIZE) == a
    assert one.rollback(1)
    assert bits(one, SIZE) == sorted(a + b)


def test_a_compilation_that_nobody_wants_ends(compiler: Grammars) -> None:
    with stoppable(lambda: True), pytest.raises(Interrupted):
        compiler.compile("start: /stopped/")
    with stoppable(lambda: False):
        compiler.compile("start: /stopped/")


def test_the_trie_is_built_once_and_who_waits_for_it_can_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, go, begun = [], threading.Event(), threading.Event()
    real = grammars.from_tokenizer

    def slow(*args: Any) -> Any:
        begun.set()
        assert go.wait(30)
        built.append(real(*args))
        return built[-1]

    monkeypatch.setattr(grammars, "from_tokenizer", slow)
    compiler = Grammars(TOKENIZER, SIZE, frozenset({END}))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(compiler.compile(f"start: /{n}/")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    looks: list[int] = []
    with stoppable(lambda: looks.append(1) or len(looks) > 3), pytest.raises(Interrupted):
        compiler.compile("start: /9/")
    go.set()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(built) == 1


def test_every_end_is_allowed_where_the_grammar_is_complete_and_there_only() -> None:
    ends = frozenset({256, 257, 259})
    made = Grammars(TOKENIZER, SIZE, ends).compile("start: /aa?/")
    assert made.ends == ends
    matcher = made.matcher()
    assert ends.isdisjoint(bits(matcher, SIZE))
    (a,) = TOKENIZER.encode("a", add_special_tokens=False)
    assert matcher.consume_token(a)
    assert set(bits(matcher, SIZE)) == {a, *ends}
    assert matcher.consume_token(a)
    assert set(bits(matcher, SIZE)) == ends
    assert matcher.consume_token(259)
    assert not bits(matcher, SIZE) or set(bits(matcher, SIZE)) <= ends


def test_tokens_that_the_tokenizer_does_not_have_are_never_allowed() -> None:
    size = SIZE + 100
    made = Grammars(TOKENIZER, size, frozenset({END})).compile("start: /(?s:.)*/")
    assert made.vocab_size == size
    allowed = bits(made.matcher(), size)
    assert max(allowed) < SIZE
    assert END in allowed
    assert 256 not in allowed  # a special token is no text
    assert len(made.matcher().compute_bitmask()) * 8 >= size


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^constraint: the model has no token that ends"):
        Grammars(TOKENIZER, SIZE, frozenset()).compile("start: /a/")


def sentencepiece() -> TokenizerWrapper:
    """Pieces, and single bytes for the rest, as Llama 2, Mistral and Gemma have them."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [*map(chr, range(0x21, 0x7F)), "▁", "é", "日", "▁a", ":▁", '":▁"']
    ids = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(SENTENCEPIECE)
    return fast(tokenizer)


EXACT = ("byte-level", "byte-level in a sequence", "SentencePiece")


@pytest.mark.parametrize("kind", [*KINDS, "SentencePiece"])
def test_a_tokenizer_is_followed_to_the_letter_or_refused(kind: str) -> None:
    tokenizer = {**KINDS, "SentencePiece": sentencepiece}[kind]()
    size, ends = len(tokenizer._tokenizer), frozenset(tokenizer.eos_token_ids)
    schema = {"type": "object", "properties": {"é": S, "n": {"type": "integer"}}}
    compiler = Grammars(tokenizer, size, ends)
    rng = random.Random(2)
    lark = f"start: {JSONSchema(schema).rule}"
    if kind not in EXACT:
        with pytest.raises(InvalidRequest, match=r"tokenizer, .*(cannot be constr|no fast impl)"):
            compiler.compile(lark)
        return
    made = compiler.compile(lark)
    for _ in range(5):
        tokens = answer(made, rng, 300)
        if tokens is not None:
            value = json.loads(str(tokenizer.decode(tokens)))
            Draft202012Validator(schema).validate(value)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() <= before
