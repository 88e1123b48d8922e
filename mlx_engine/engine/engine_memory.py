"""The memory of one engine: how much it may have, its account in the ledger, and its weights."""

from __future__ import annotations

from mlx_engine.core.ledger import Account, ledger
from mlx_engine.core.machine import Memory, memory_limit
from mlx_engine.core.mlx_thread import mlx_thread
from mlx_engine.core.pressure import watch_pressure
from mlx_engine.errors import EngineDead, InvalidRequest, NotEnoughMemory
from mlx_engine.memory_stats import MemoryStats


class EngineMemory:
    """An engine's account, from the moment at which it loads until it has no model any more.

    Attributes:
        owner: what the account is called; the model's name, if it is empty.
        part: bytes that all engines of this process may have, if another one has said so.
    """

    def __init__(self) -> None:
        self.owner = ""
        self.part: int | None = None
        self._account: Account | None = None
        self._own: int | None = None
        self._told = MemoryStats()  # of the account that was closed last

    @property
    def account(self) -> Account:
        """The account. From any thread.

        Raises:
            EngineDead: there is no model.
        """
        if self._account is None:
            raise EngineDead("the engine has no model any more")
        return self._account

    def stats(self) -> MemoryStats:
        """A snapshot. From any thread."""
        account = self._account
        return self._told if account is None else account.stats()

    def limit(self, part: int | None) -> None:
        """Have ``part`` bytes at most, whatever the engine was made with. From any thread.

        What it has already it keeps, but for stored prompts.
        """
        self.part = part
        account = self._account
        if account is None or part is None:
            return
        account.limit = part if self._own is None else min(part, self._own)
        mlx_thread.post(account.shed)

    def open(self, model: str, memory: Memory, weights: int, drafts: int) -> None:
        """Claim the weights before they are read. On the MLX thread.

        Args:
            model: its name.
            memory: what the engine was made with.
            weights, drafts: bytes of the files.

        Raises:
            InvalidRequest: it may have more than the machine has.
            NotEnoughMemory: there is no room for the weights.
        """
        self.close()
        self._own = memory_limit(memory, ledger().machine)
        account = self._account = ledger().account(self.owner or model, self._own)
        if self.part is not None:
            account.limit = self.part if self._own is None else min(self.part, self._own)
        watch_pressure()
        try:
            self._claim(account, model, weights, drafts)
        except NotEnoughMemory:
            self.close()
            raise

    def correct(self, model: str, weights: int, drafts: int) -> None:
        """Claim the weights as they have come to be; raises what ``open`` does."""
        account = self.account
        for kind, nbytes in (("weights", weights), ("drafts", drafts)):  # first what is less
            if nbytes < getattr(account.use, kind):
                account.claim(kind, nbytes)
        self._claim(account, model, weights, drafts)

    def share_caches(self, nbytes: int) -> None:
        """Let KV caches of requests and stored prompts have ``nbytes`` together. On the MLX thread.

        Raises:
            InvalidRequest: it is more than the engine may have besides its models.
        """
        account = self.account
        room = account.room("live", "stored")
        if self._own is not None and room is not None and nbytes > room:
            raise InvalidRequest(
                "kv_cache_memory_bytes",
                f"is {nbytes}, and memory, which is {self._own} bytes, has {room} for it beside "
                f"{account.use.models} of weights: lower it, or raise memory",
            )
        account.share(("live", "stored"), nbytes)

    def close(self) -> None:
        """Have nothing any more; may be called again. On the MLX thread."""
        account, self._account = self._account, None
        if account is not None:
            account.close()
            self._told = MemoryStats(peak=account.peak, refused=account.refused)

    def _claim(self, account: Account, model: str, weights: int, drafts: int) -> None:
        if account.claim("weights", weights) and account.claim("drafts", drafts):
            return
        needed, available = weights + drafts, account.room("weights", "drafts") or 0
        total, others = ledger().total, [one for one in ledger().accounts if one is not account]
        has = ", ".join(f"{one.name} has {one.use.total}" for one in others) or "nobody has any"
        limit = "" if account.limit is None else f", of which it may have {account.limit} (memory)"
        raise NotEnoughMemory(
            f"{model} needs {needed} bytes for its weights, and {available} are left: all engines "
            f"of this process may have {total} together{limit}; {has}. Stop another engine, give "
            "others less (memory), or take a smaller model or one that is quantised",
            needed=needed,
            available=available,
        )
