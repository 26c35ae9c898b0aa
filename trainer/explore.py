"""A run under a schedule: one case, in one order after another, until enough is known. Imports no framework."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.audit.findings import Finding
from trainer.audit.guarantees import GUARANTEES
from trainer.audit.orders import ORDERS, Example, Explored, Judged, deadlocked, judge_order, pictured
from trainer.audit.records import RunRecord
from trainer.audit.spans import Trace
from trainer.config import Config, Replay, Search, Seeded
from trainer.report.trace import of_history
from trainer.schedule.case import Case
from trainer.schedule.order import Abandoned, Choose, Deadlock, Order
from trainer.schedule.recipes import RECIPES
from trainer.schedule.replay import hash_of
from trainer.schedule.sampling import priorities, random_walk
from trainer.schedule.search import Search as Orders
from trainer.schedule.shrink import follow, shorter
from trainer.schedule.tokens import Replay as Replayed
from trainer.schedule.tokens import parse, token_of
from trainer.schedule.turnstile import Failed, Stalled
from trainer.strategies.hosting import StopFlag

SECONDS_BETWEEN_REPORTS = 0.2
# Runs that making one found order smaller may take.
SHRINKING_RUNS = 300


class Broken(Exception):
    """A replica raised or stalled in some order, which cannot be judged then; the cause says how."""

    def __init__(self, order: Order, token: str) -> None:
        super().__init__(token)
        self.order, self.token = order, token


@dataclass
class _Ran:
    order: Order
    judged: Judged
    record: RunRecord


class Explorer:
    """Runs a case in orders that the schedule chooses, and keeps what they show.

    Args:
        new_record: an empty record for one run.
        find: what a record tells, by guarantee.
        report: called now and then with what is known so far and an estimate, 0 to 1, of how much that is.

    Attributes:
        explored: what is known so far; complete when `run` returns, and of use when it raises.
        order: the last that was run: when `run` returns, the one whose record that is; None before the first.
    """

    def __init__(
        self,
        config: Config,
        case: Case,
        new_record: Callable[[], RunRecord],
        find: Callable[[RunRecord], dict[str, Finding]],
        report: Callable[[Explored, float], None],
        stop: StopFlag,
    ) -> None:
        self.explored = Explored()
        self.order: Order | None = None
        self._config, self._case = config, case
        self._new_record, self._find, self._report, self._stop = new_record, find, report, stop
        self._hash = hash_of(config)
        self._reported_at = time.monotonic()
        self._left = 0  # operations that there is time for

    def run(self) -> RunRecord:
        """Run as many orders as the schedule asks for, and then one more: the record of the one that tells most.

        Raises:
            Broken: a replica raised, or waits for what a schedule cannot see.
            Diverged: a replay came to something else than its token.
        """
        schedule = self._config.schedule
        if isinstance(schedule, Replay):
            return self._replay(schedule.token)
        if isinstance(schedule, Seeded):
            self._sample(schedule)
        elif schedule.name in RECIPES:
            self._seek(schedule)
        else:
            self._search(schedule)
        if self.explored.kind != "replayed":  # a recipe's order has as few preemptions as there can be
            self._shrink()
        return self._tell_most()

    def trace(self) -> Trace | None:
        """When replicas did what in `order`."""
        order = self.order
        return None if order is None else of_history(order.history, str(token_of(order, self._hash)))

    # Every order.

    def _search(self, schedule: Search) -> None:
        """All orders with few preemptions, which are the smallest examples; then all orders, if there is time."""
        self._left = schedule.max_operations
        orders = 0
        for preemptions in range(schedule.preemptions + 1):
            if not self._cover(Orders(preemptions)):
                return
            self.explored.kind, self.explored.preemptions = "bounded", preemptions
            if self.explored.orders == orders:
                # None needs more preemptions than there were the last time.
                self.explored.kind = "all_orders"
                return
            orders = self.explored.orders
        if self._cover(Orders()):
            self.explored.kind = "all_orders"

    def _cover(self, orders: Orders) -> bool:
        """Run one search to its end; False where there is no time for that."""
        while orders.unfinished and self._has_time:
            ran = self._once(orders.choose)
            if ran is None:
                orders.cut()
            else:
                orders.complete(ran.judged.labels)
            if self._is_due():
                self._count(orders)
                self._report(self.explored, orders.share)
        self._count(orders)
        self.explored.hidden |= orders.hidden
        return not orders.unfinished

    @property
    def _has_time(self) -> bool:
        return self._left > 0 and not self._stop.is_set()

    def _count(self, orders: Orders) -> None:
        """Keep a search's counts: those of one that has not ended only until one has."""
        if self.explored.kind == "unfinished" or not orders.unfinished:
            found = orders.found
            self.explored.counts, self.explored.orders, self.explored.runs = found, found[ORDERS], orders.completed

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._reported_at < SECONDS_BETWEEN_REPORTS:
            return False
        self._reported_at = now
        return True

    # Until something shows.

    def _seek(self, schedule: Search) -> None:
        """The order with the fewest preemptions that shows what the recipe is named for; else every order."""
        self.explored.sought = RECIPES[schedule.name]
        self._left = schedule.max_operations
        for preemptions in range(schedule.preemptions + 1):
            orders = Orders(preemptions)
            while orders.unfinished and self._has_time:
                ran = self._once(orders.choose)
                if ran is None:
                    orders.cut()
                    continue
                orders.complete(ran.judged.labels)
                if self._shows(ran.judged):
                    self._only(ran)
                    return
        self.explored.examples.clear()
        self._search(schedule)

    def _shows(self, judged: Judged) -> bool:
        sought = set(self.explored.sought)
        return any(label.partition(" ")[2] in sought for label in judged.labels)

    def _only(self, ran: _Ran) -> None:
        """Keep what this order shows and nothing else."""
        self.explored = Explored("replayed", 1, 1, sought=self.explored.sought)
        self.explored.counts = Counter([ORDERS, *ran.judged.labels])
        self._keep(ran)

    # Some orders.

    def _sample(self, schedule: Seeded) -> None:
        """Orders drawn at random, the first with as few switches as there can be: it tells how long replicas are."""
        first = self._once(lambda order: follow(order, ()))
        assert first is not None
        lengths = [first.order.granted.count(own) for own in range(self._case.num_replicas)]
        counts, seen = Counter([ORDERS, *first.judged.labels]), {first.order.prefix}
        for choose in self._choosers(schedule, lengths):
            if self._stop.is_set():
                break
            ran = self._once(choose)
            assert ran is not None
            counts.update([ORDERS, *ran.judged.labels])
            seen.add(ran.order.prefix)
            self.explored.kind, self.explored.counts, self.explored.distinct = "sampled", counts, len(seen)
            self.explored.orders = self.explored.runs = counts[ORDERS]
            if self._is_due():
                self._report(self.explored, counts[ORDERS] / (schedule.orders + 1))

    def _choosers(self, schedule: Seeded, lengths: list[int]) -> Iterator[Choose]:
        for number in range(schedule.orders):
            seed = schedule.seed + number
            if schedule.sampler == "random_walk" or (schedule.sampler == "both" and number % 2 == 0):
                yield random_walk(seed, lengths)
            else:
                yield priorities(seed, lengths, schedule.depth)

    def _shrink(self) -> None:
        """Make each example smaller, a switch at a time, for as long as it shows the same."""
        for label in list(self.explored.examples):
            left = SHRINKING_RUNS
            smaller = True
            while smaller and left and not self._stop.is_set():
                example, smaller = self.explored.examples[label], False
                for granted in shorter(example.granted):
                    left -= 1
                    self._once(lambda order, granted=granted: follow(order, granted))  # type: ignore[misc]
                    smaller = self.explored.examples[label].size < example.size
                    if smaller or not left:
                        break

    # One order.

    def _replay(self, text: str) -> RunRecord:
        replay = Replayed(parse(text))
        ran = self._once(replay.choose)
        assert ran is not None
        replay.check(ran.order, done=True)
        self._only(ran)
        return ran.record

    def _tell_most(self) -> RunRecord:
        """Run the order once more that the first broken guarantee has for an example; else one without preemptions."""
        rank = list(GUARANTEES)
        examples = sorted(
            (rank.index(label.partition(" ")[0]), example.size, example.granted)
            for label, example in self.explored.examples.items()
            if label.partition(" ")[0] in rank
        )
        granted = examples[0][2] if examples else ()
        ran = self._once(lambda order: follow(order, granted))
        assert ran is not None
        return ran.record

    def _once(self, choose: Choose) -> _Ran | None:
        """Run the case in one order and keep what it shows; None where the chooser wanted no more of it."""
        order = self.order = Order(self._case.num_replicas, choose, joint=self._case.joint, copies=self._case.copies)
        record = self._new_record()
        try:
            self._case.run(order, record)
            judged = judge_order(record, order.history, self._find)
        except Abandoned:
            return None
        except Deadlock as deadlock:
            judged = deadlocked(deadlock.told, deadlock.stacks, order.history)
        except (Failed, Stalled) as error:
            raise Broken(order, str(token_of(order, self._hash))) from error
        finally:
            self._left -= len(order.granted)
        ran = _Ran(order, judged, record)
        self._keep(ran)
        return ran

    def _keep(self, ran: _Ran) -> None:
        explored, order = self.explored, ran.order
        if not explored.first and ran.judged.outcome is not None:
            explored.first = {
                name: Finding(each.evidence, each.checked, each.applies) for name, each in ran.judged.findings.items()
            }
        for name, finding in ran.judged.findings.items():
            for anomaly in finding.anomalies if finding.applies else ():
                label = f"{name} {anomaly.kind}"
                size = (order.preemptions, order.switches, len(order.granted))
                before = explored.examples.get(label)
                if before is None or size < before.size:
                    token, seen = str(token_of(order, self._hash)), ran.judged.witnesses.get(label)
                    told = pictured(anomaly, order.history, seen)
                    explored.examples[label] = Example(
                        token, order.preemptions, order.switches, told, tuple(order.granted)
                    )
