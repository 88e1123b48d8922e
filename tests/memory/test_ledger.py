"""The ledger as a value: the sum never exceeds the machine, and closing returns everything."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_engine.core.ledger import Account, Ledger
from mlx_engine.core.machine import FixedMachine
from mlx_engine.memory_stats import KINDS, MemoryUse

CACHES = ("live", "stored")
_clock = itertools.count(1)


class Prompts:
    """Stored prompts of an account, by their bytes."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.entries: OrderedDict[int, int] = OrderedDict()
        account.stored = self

    @property
    def nbytes(self) -> int:
        return sum(self.entries.values())

    def store(self, nbytes: int) -> bool:
        if not self.account.claim("stored", self.nbytes + nbytes):
            return False
        self.entries[next(_clock)] = nbytes
        return True

    def oldest(self) -> float | None:
        return next(iter(self.entries), None)

    def evict(self) -> None:
        self.entries.popitem(last=False)
        self.account.set("stored", self.nbytes)


def charge(use: MemoryUse) -> float:
    """Bytes that have to be set aside: a tenth beside the caches is for computing them."""
    return use.models + use.caches / 0.9


def check(book: Ledger, total: int | None, limits: dict[Account, int | None]) -> None:
    everything = sum((one.use for one in book.accounts), MemoryUse())
    assert book.use == everything
    assert total is None or charge(everything) <= total
    for account, limit in limits.items():
        if account.is_open and limit is not None:
            assert charge(account.use) <= limit
        assert account.peak >= account.use.total
        if account.is_open:
            for kinds in (("live",), ("stored",), CACHES, ("weights",)):
                room = account.room(*kinds)
                pressed = book.stage != "none" and kinds == ("stored",)
                assert (room is None) == (total is None and limit is None and not pressed)
                assert room is None or room >= 0


amounts = st.integers(0, 200)
steps = st.one_of(
    st.tuples(st.just("open"), st.none() | st.integers(0, 800)),
    st.tuples(st.just("claim"), st.integers(0, 5), st.sampled_from(KINDS), amounts),
    st.tuples(st.just("store"), st.integers(0, 5), amounts),
    st.tuples(st.just("close"), st.integers(0, 5)),
    st.tuples(st.just("relieve"), st.sampled_from(["none", "shrink", "stop"])),
)


@settings(max_examples=int(os.environ.get("MLX_ENGINE_EXAMPLES", "1000")), deadline=None)
@given(total=st.none() | st.integers(0, 1000), program=st.lists(steps, max_size=40))
def test_no_program_takes_more_than_there_is(
    total: int | None, program: list[tuple[Any, ...]]
) -> None:
    book = Ledger(FixedMachine(total))
    limits: dict[Account, int | None] = {}
    prompts: dict[Account, Prompts] = {}
    for name, *given_ in program:
        accounts = list(limits)
        if name == "open":
            account = book.account(f"engine {len(limits)}", given_[0])
            limits[account], prompts[account] = given_[0], Prompts(account)
        elif name == "relieve":
            book.stage, book.relief_due = given_[0], True
            before = book.use.stored
            book.relieve()
            assert book.use.stored <= before // 2
        elif accounts:
            account = accounts[given_[0] % len(accounts)]
            if name == "close":
                account.close()
                prompts[account].entries.clear()
            elif name == "store":
                prompts[account].store(given_[1])
            elif given_[1] != "stored":
                _claim(book, account, given_[1], given_[2])
        check(book, total, limits)
    for account in limits:
        account.close()
    assert book.use == MemoryUse()
    assert book.accounts == ()


def _claim(book: Ledger, account: Account, kind: str, nbytes: int) -> None:
    before, others = account.use, book.use
    room, refused = account.room(kind), account.refused
    grows = nbytes > getattr(before, kind)
    if account.claim(kind, nbytes):
        assert getattr(account.use, kind) == (nbytes if account.is_open else 0)
        if account.is_open and grows and room is not None and kind == "live":
            own = before.stored  # what may have given way
            assert nbytes <= room + own + 1  # of rounding
    else:
        assert grows, "less never fails"
        assert (account.use, book.use) == (before, others), "nothing has changed"
        assert account.refused == refused + 1
        assert not account.is_open or (room is not None and nbytes > room)


@given(total=st.integers(0, 10**6), models=st.integers(0, 10**6), data=st.data())
def test_all_of_the_room_can_be_had_and_not_a_byte_more(
    total: int, models: int, data: st.DataObject
) -> None:
    book = Ledger(FixedMachine(total))
    one, other = book.account("one"), book.account("other")
    other.claim("weights", min(models, total))
    other.claim("live", data.draw(st.integers(0, other.room("live") or 0)))
    room = one.room("live")
    assert room is not None
    assert one.claim("live", room)
    assert not one.claim("live", room + 1)
    assert one.claim("live", 0)
    free = book.free
    assert free is not None
    assert one.claim("weights", free)
    assert not one.claim("drafts", 1)


def test_its_own_stored_prompts_give_way_first_then_the_oldest_of_any_engine() -> None:
    book = Ledger(FixedMachine(1000))
    accounts = [book.account(name) for name in "abc"]
    a, b, c = (Prompts(account) for account in accounts)
    for prompts, nbytes in ((b, 100), (c, 100), (b, 100), (c, 100), (a, 100), (a, 100)):
        assert prompts.store(nbytes)
    assert a.account.claim("live", 300)
    assert [len(one.entries) for one in (a, b, c)] == [2, 2, 2], "there was room"
    assert a.account.claim("live", 400)
    assert [len(one.entries) for one in (a, b, c)] == [1, 2, 2]
    assert a.account.claim("live", 600)
    assert [len(one.entries) for one in (a, b, c)] == [0, 1, 2], "the oldest was b's"
    assert a.account.claim("live", 700)
    assert [len(one.entries) for one in (a, b, c)] == [0, 1, 1]


def test_nobody_loses_anything_for_what_cannot_fit() -> None:
    book = Ledger(FixedMachine(1000))
    one, other = book.account("one", 200), book.account("other")
    prompts = Prompts(other)
    assert prompts.store(500)
    assert not one.claim("live", 300)
    assert not one.claim("weights", 1001)
    assert prompts.nbytes == 500
    assert one.refused == 2


def test_stored_prompts_are_dropped_on_their_thread_only() -> None:
    cleared: list[bool] = []
    book = Ledger(FixedMachine(1000), lambda: False, lambda: cleared.append(True))
    one = book.account("one")
    prompts = Prompts(one)
    assert prompts.store(900)
    assert not one.claim("live", 100)
    assert prompts.nbytes == 900
    book.may_evict = lambda: True
    assert one.claim("live", 100)
    assert cleared == [True], "MLX's own cache goes before"


def test_a_share_bounds_its_kinds_exactly() -> None:
    book = Ledger(FixedMachine(None))
    one = book.account("one")
    one.share(("live", "stored"), 100)
    assert one.room("live", "stored") == 100
    assert one.claim("live", 60)
    assert one.room("stored") == 40
    assert not one.claim("stored", 41)
    assert one.claim("stored", 40)
    assert one.claim("weights", 10**12)


def test_a_limit_that_is_lowered_takes_nothing_but_stored_prompts() -> None:
    book = Ledger(FixedMachine(1000))
    one = book.account("one")
    prompts = Prompts(one)
    assert one.claim("weights", 300)
    assert one.claim("live", 90)
    assert prompts.store(90)
    assert prompts.store(90)
    one.limit = 500
    one.shed()
    assert one.use == MemoryUse(weights=300, live=90, stored=90)
    one.limit = 200
    one.shed()
    assert one.use == MemoryUse(weights=300, live=90)
    assert not one.claim("live", 91)
    assert one.claim("live", 50)


def test_under_pressure_nothing_more_is_stored_and_half_goes_each_time() -> None:
    book = Ledger(FixedMachine(10_000))
    prompts = Prompts(book.account("one"))
    for _ in range(8):
        assert prompts.store(100)
    book.stage, book.relief_due = "shrink", True
    book.relieve()
    assert len(prompts.entries) == 4
    book.relieve()
    assert len(prompts.entries) == 4, "not before it is due again"
    assert not prompts.store(100)
    book.stage = "none"
    assert prompts.store(100)


def test_the_machine_is_looked_at_again_when_nobody_has_anything() -> None:
    book = Ledger(FixedMachine(1000))
    one = book.account("one")
    book.machine = FixedMachine(2000)
    assert book.total == 1000
    one.close()
    assert book.account("two").room("weights") == 2000


def test_stats_say_who_has_what() -> None:
    book = Ledger(FixedMachine(1000))
    one, other = book.account("one", 800), book.account("other")
    assert one.claim("weights", 300)
    assert other.claim("processes", 500)
    assert not one.claim("drafts", 300)
    stats = one.stats()
    assert (stats.total, stats.limit, stats.peak, stats.refused) == (1000, 800, 300, 1)
    assert [(owner.name, owner.use.total) for owner in stats.owners] == [
        ("one", 300),
        ("other", 500),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_account_gets_nothing(kind: str) -> None:
    book = Ledger(FixedMachine(1000))
    one = book.account("one")
    one.close()
    one.close()
    assert not one.claim(kind, 1)
    assert one.claim(kind, 0)
    assert book.use == MemoryUse()
