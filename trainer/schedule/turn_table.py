"""Replicas of MirroredStrategy in the order that `order` makes.

MirroredStrategy runs one replica at a time, from one `merge_call` to the next, and there only it goes over to another.
So a replica whose turn it is not calls `merge_call` until it is, and an operation that can be granted to whoever
announces it needs none.

Invariants:
- Whoever announces something last, when every other replica waits or is through, decides who goes next.
- All replicas make the same number of merge calls: those that are through go on calling until all are, and when an
  order ends early, all leave in the same one.
- Every merge call of the program's own (an all-reduce, an aggregated assignment, synchronized normalization) is a
  barrier in the order, so that no replica makes one while another waits for its turn.

Assumption: nobody holds a real lock across an announcement. Whoever then waited for it would wait for ever; that is
`Stalled`.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from trainer.schedule.operations import BARRIER, LOCK, Operation
from trainer.schedule.order import DONE, Abandoned, Deadlock, Order
from trainer.schedule.point import hosted
from trainer.schedule.turnstile import POLL_SECONDS, Failed, Stalled, stacks

COLLECTIVE = "merge_call"


class TurnTable:
    """Runs one replica function under MirroredStrategy, eagerly, in the order that `order` makes.

    Args:
        seconds: after which a replica that neither ends nor announces anything is given up.
    """

    def __init__(self, order: Order, seconds: float = 60.0) -> None:
        self.order = order
        self._seconds = seconds
        self._collective = Operation(BARRIER, COLLECTIVE, (COLLECTIVE,), LOCK, str(order.num_replicas))
        self._merge_call = tf.distribute.ReplicaContext.merge_call
        self._replicas: dict[int, int] = {}  # of threads by their identity
        self._contexts: list[Any] = [None] * order.num_replicas
        self._results: list[Any] = [None] * order.num_replicas
        self._decided: frozenset[int] = frozenset()  # who goes on, from when all replicas have met
        self._going: frozenset[int] = frozenset()
        self._ended = False  # nothing more is granted
        self._dismissed = False  # and nobody waits for anybody any more
        self._error: BaseException | None = None
        self._stopped: Failed | None = None  # the first replica that a merge call did not come back to

    def run(self, strategy: Any, replica_fn: Callable[..., Any], args: Sequence[Any] = ()) -> list[Any]:
        """Run the function in every replica, as `strategy.run` does, and return what each of them returned.

        Raises:
            Abandoned: the order was given up by its chooser.
            Deadlock: no replica could go on.
            Failed: a replica raised, or what the replicas do together did.
            Stalled: a replica waits for what the schedule cannot see; the threads are left behind.
        """

        def replica(*args: Any) -> None:
            self._replica(replica_fn, args)

        def host() -> None:
            try:
                strategy.run(replica, args=tuple(args))
            except Exception as error:
                # No replica's own, which end in `_replica`: what all do together failed, and it is the first to say so.
                self._error = self._error or _failed(0, error)

        with hosted(self), self._collectives_announced():
            self._decide()
            # A thread of its own, which can be left behind where a replica never comes back.
            thread = threading.Thread(target=host, name="replicas", daemon=True)
            thread.start()
            self._wait(thread)
        error = self._error or self._stopped
        if error is not None:
            raise error
        return self._results

    def own(self) -> int | None:
        return self._replicas.get(_thread.get_ident())

    def announce(self, own: int, operation: Operation) -> None:
        if self._ended:
            raise Abandoned
        if not tf.executing_eagerly():
            raise RuntimeError(
                f"'{operation.told}' was announced while a graph was traced: a graph's operations have an order of "
                "their own. Under a schedule replica functions run eagerly."
            )
        self._come_to(own, operation)
        if self._decided != {own}:
            self._take_turns(own)
        if self._ended:
            raise Abandoned

    # What replicas do.

    def _replica(self, replica_fn: Callable[..., Any], args: Sequence[Any]) -> None:
        context = tf.distribute.get_replica_context()
        own = int(tf.get_static_value(context.replica_id_in_sync_group))
        self._contexts[own] = context
        self._replicas[_thread.get_ident()] = own
        try:
            if not self._ended:
                self._results[own] = replica_fn(*args)
        except Abandoned:
            pass
        except Exception as error:
            if not self._ended:  # else it has made something of its own of being told to end
                self._end(_failed(own, error))
        if not self._ended:
            self._come_to(own, DONE)
        self._take_turns(own)

    def _come_to(self, own: int, operation: Operation) -> None:
        """Say what comes next, and where all others have done so, decide."""
        self.order.announce(own, operation)
        if None not in self.order.pending:
            self._decide()

    def _take_turns(self, own: int) -> None:
        """Let others run until it is this replica's turn, or all are dismissed."""
        while not self._dismissed:
            self._merge(own, self._meet)
            if own in self._going:
                return

    def _meet(self, strategy: Any) -> None:
        """Run while all replicas wait. What was decided comes into force here only.

        They come out of a merge call one by one, and what the first decides meanwhile must not reach the others, or
        they would not all make the same merge calls.
        """
        self._going, self._dismissed = self._decided, self._ended

    def _merge(self, own: int, merge_fn: Callable[..., Any], args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._merge_call(self._contexts[own], merge_fn, args, kwargs)
        except Exception as error:
            # MirroredStrategy ends all replicas and lets them meet no more.
            self._stopped = self._stopped or _failed(own, error)
            self._ended = self._dismissed = True
            raise

    @contextmanager
    def _collectives_announced(self) -> Iterator[None]:
        """Make a barrier of every merge call that the replica function makes, whoever's code it is in."""

        def merge_call(context: Any, merge_fn: Callable[..., Any], args: Any = (), kwargs: Any = None) -> Any:
            own = self.own()
            if own is None:
                return self._merge_call(context, merge_fn, args, kwargs)
            self.announce(own, self._collective)
            return self._merge(own, merge_fn, args, kwargs)

        replaced = tf.distribute.ReplicaContext
        inherited = "merge_call" not in vars(replaced)
        replaced.merge_call = merge_call
        try:
            yield
        finally:
            if inherited:
                del replaced.merge_call
            else:
                replaced.merge_call = self._merge_call

    # Deciding.

    def _decide(self) -> None:
        try:
            self._decided = frozenset(_next(self.order))
        except Deadlock as deadlock:
            deadlock.stacks = stacks(self._replicas, deadlock.waits)
            self._end(deadlock)
        except BaseException as error:
            self._end(error)
        else:
            if not self._decided:
                self._end(None)

    def _end(self, error: BaseException | None) -> None:
        """Grant nothing more: whatever is announced from here on is refused."""
        self._error, self._decided, self._ended = error, frozenset(), True

    # What the calling thread does meanwhile.

    def _wait(self, thread: threading.Thread) -> None:
        """Until all threads have ended, or nothing has been granted for too long."""
        seen, since = -1, time.monotonic()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            granted = len(self.order.history.events)
            if granted != seen:
                seen, since = granted, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                own = next((each for each, operation in enumerate(self.order.pending) if operation is None), 0)
                self._end(Stalled(own, self._seconds, stacks(self._replicas, [own])[own]))
                return


def _failed(own: int, error: Exception) -> Failed:
    failed = Failed(own, error)
    failed.__cause__ = error
    return failed


def _next(order: Order) -> list[int]:
    """Who goes on now: one replica, or all that a start or a barrier lets go; nobody when all are through.

    Those need not come one by one here: each runs to its next announcement by itself before the next one does.
    """
    going = order.release_all()
    if not going:
        following = order.next()
        going = [] if following is None else [following, *order.release_all()]
    return going
