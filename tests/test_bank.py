"""`workload=bank`: what each way to transfer keeps over every order, what a free run tells, and what is refused."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from command import Command, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.audit.orders import Explored
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.audit.verdict import Anomaly
from trainer.config import Bank, Config, Search, Train
from trainer.experiments import experiments
from trainer.one_run import UNWATCHED, explorer_of
from trainer.rules import validate
from trainer.state.layout import EMPTY
from trainer.state.synchronized import Poisoned
from trainer.strategies.hosting import RunBroken
from trainer.workloads.bank import plan, rules, workload
from trainer.workloads.bank.accounts import CHANGES, Account, Overdraft, UnknownAccount
from trainer.workloads.bank.plan import Transfer
from trainer.workloads.bank.transfers import WAYS

WAIT = 30.0
# Those that keep everything that they are asked for, and are never in deadlock.
SAFE = ("with_lock", "synchronized", "ordered_locks", "acquire_locked")


class Never:
    def is_set(self) -> bool:
        return False


def config(num_replicas: int = 2, steps: int = 1, **keys: Any) -> Config:
    made = Config(num_replicas=num_replicas, workload=Bank(**keys), train=Train(steps=steps))
    validate(made)
    return made


def search(num_replicas: int = 2, steps: int = 1, **keys: Any) -> Explored:
    """Every order of a small case."""
    made = config(num_replicas, steps, **keys)
    made.schedule = Search()
    validate(made)
    explorer = explorer_of(made, Never())
    explorer.run()
    assert explorer.explored.kind == "all_orders"
    return explorer.explored


def broken(explored: Explored) -> dict[str, int]:
    """In how many orders each guarantee is broken."""
    names = ("no_lost_updates", "no_torn_reads", "invariants_kept", "no_deadlock")
    return {name: explored.counts[name] for name in names if explored.counts[name]}


def kinds(explored: Explored, guarantee: str) -> dict[str, int]:
    labels = (label.partition(" ") for label in explored.counts)
    return {kind: explored.counts[f"{name} {kind}"] for name, _, kind in labels if name == guarantee and kind}


def seen(explored: Explored, label: str) -> Anomaly:
    return explored.examples[label].anomaly


def run(num_replicas: int = 2, steps: int = 200, **keys: Any) -> dict[str, Any]:
    """What a free run finds."""
    made = config(num_replicas, steps, **keys)
    replicas = [ReplicaRecord.empty(own, 0, num_replicas) for own in range(num_replicas)]
    record = RunRecord(EMPTY, steps, replicas, trains=False)
    found = dict(workload.run(made, record, UNWATCHED, Never()))
    return {**found, "metrics": record.metrics}


def way(transfer: str, refused: str = "before") -> tuple[Any, dict[str, Account]]:
    accounts = {name: Account(name, balance) for name, balance in plan.balances(Bank()).items()}
    return WAYS[transfer](accounts, CHANGES[refused]), accounts


def held(accounts: dict[str, Account]) -> dict[str, int]:
    return {name: account.now.balance for name, account in accounts.items()}


# Over every order.

OPPOSITE = ["x:y:5", "y:x:10"]
CASES = {
    "opposite": (2, 1, OPPOSITE),
    "one way": (2, 1, ["x:y:5", "x:y:10"]),
    "overdraft": (2, 1, ["x:y:20", "x:z:20"]),
    "unknown": (2, 1, ["x:nobody:5", "y:x:10"]),
    "twice": (2, 2, [*OPPOSITE, "z:x:3", "nobody:y:5"]),
    "three": (3, 1, ["x:y:5", "y:z:10", "z:x:10"]),
}
every_case = pytest.mark.parametrize("case", CASES)


@every_case
@pytest.mark.parametrize("transfer", [*SAFE, "unlocked"])
def test_money_is_conserved_over_every_order_under_each_lock_and_not_without(transfer: str, case: str) -> None:
    num_replicas, steps, transfers = CASES[case]
    explored = search(num_replicas, steps, transfer=transfer, transfers=transfers)
    if transfer != "unlocked":
        assert broken(explored) == {}
        assert explored.orders >= (1 if case == "unknown" else 2)
    elif case != "unknown":  # of two transfers of which one is refused, nobody comes between the other's steps
        assert explored.counts["no_lost_updates"] > 0
        assert explored.counts["invariants_kept"] > 0
        assert explored.counts["no_deadlock"] == 0


def test_the_counts_of_two_transfers_without_a_lock() -> None:
    """4 reads and writes each: 70 orders, in 32 of which one writes over what the other wrote after it had read."""
    explored = search(transfer="unlocked", transfers=OPPOSITE)
    assert explored.orders == 70
    assert broken(explored) == {"no_lost_updates": 32, "invariants_kept": 32}
    assert kinds(explored, "invariants_kept") == {"money_created": 24, "lost_money": 8}
    assert "lost_update" in kinds(explored, "no_lost_updates")


small_transfers = st.lists(
    st.tuples(st.permutations(["x", "y", "z", "nobody"]), st.integers(1, 40)).map(
        lambda drawn: f"{drawn[0][0]}:{drawn[0][1]}:{drawn[1]}"
    ),
    min_size=2,
    max_size=3,
)


@settings(max_examples=25, deadline=None)
@given(small_transfers, st.sampled_from(SAFE), st.sampled_from(["before", "undone"]))
def test_money_is_conserved_whatever_is_transferred(transfers: list[str], transfer: str, refused: str) -> None:
    refused = "before" if transfer in rules.LOOK_UP_FIRST else refused
    explored = search(len(transfers), 1, transfer=transfer, transfers=transfers, refused=refused)
    assert broken(explored) == {}


@settings(max_examples=10, deadline=None)
@given(small_transfers)
def test_whatever_is_transferred_may_be_in_the_way_without_a_lock_where_both_write_one_account(
    transfers: list[str],
) -> None:
    """Unsafe twin: two that both go through."""
    first, second = (plan.listed(Bank(transfers=[each]))[0] for each in transfers[:2])
    goes = all("nobody" not in each[:2] and each.amount <= 20 for each in (first, second))
    meets = {first.source, first.destination} & {second.source, second.destination}
    explored = search(2, 1, transfer="unlocked", transfers=transfers[:2], accounts=["x:100", "y:100", "z:100"])
    if goes and meets:
        assert explored.counts["no_lost_updates"] > 0
    if not meets - {"nobody"}:
        assert broken(explored) == {}


# S1.5: bare acquire and release.

UNKNOWN = ["x:nobody:5", "y:z:10"]


@pytest.mark.parametrize("transfer", ["bare_lock", "with_lock"])
@pytest.mark.parametrize("num_replicas", [2, 3])
def test_a_bare_lock_is_never_released_after_an_exception_and_with_releases_it(
    transfer: str, num_replicas: int
) -> None:
    transfers = [*UNKNOWN, "z:y:1"][:num_replicas]
    explored = search(num_replicas, 1, transfer=transfer, transfers=transfers)
    orders = {2: 2, 3: 6}[num_replicas]
    if transfer == "with_lock":
        assert explored.orders == orders
        assert broken(explored) == {}
        return
    # Whoever has not been before the one that raises waits for ever: only where it comes last does everybody end.
    assert broken(explored) == {"no_deadlock": explored.orders - {2: 1, 3: 2}[num_replicas]}
    told = explored.told_deadlock
    assert "replica 1 waits for the bank's lock, which replica 0 holds and is through" in told


def test_a_replica_that_goes_on_after_the_exception_waits_for_itself_in_every_order() -> None:
    explored = search(2, 2, transfer="bare_lock", transfers=UNKNOWN)
    assert broken(explored) == {"no_deadlock": explored.orders}
    assert "replica 0 waits for the bank's lock, which it holds itself" in explored.told_deadlock


@pytest.mark.parametrize("transfer", WAYS)
@pytest.mark.parametrize("bad", ["x:nobody:5", "nobody:x:5", "x:y:1000"])
def test_what_cannot_be_made_is_refused_and_changes_nothing(transfer: str, bad: str) -> None:
    bank, accounts = way(transfer)
    before = held(accounts)
    source, destination, amount = bad.split(":")
    with pytest.raises(UnknownAccount if "nobody" in bad else Overdraft) as raised:
        bank.transfer(Transfer(source, destination, int(amount)))
    assert str(raised.value) == ("no account is called nobody" if "nobody" in bad else "x holds 25, less than 1000")
    assert held(accounts) == before
    if transfer == "bare_lock":  # unsafe twin: nobody else comes in any more
        assert not bank._lock.acquire(timeout=0.01)
        return
    bank.transfer(Transfer("x", "y", 5))
    assert held(accounts) == {"x": 20, "y": 105, "z": 200}
    assert bank.audit() == 325


# S1.7: releasing is not undoing.


@pytest.mark.parametrize(
    ("transfer", "refused", "lost"),
    [
        ("with_lock", "midway", 5),
        ("with_lock", "undone", 0),
        ("with_lock", "before", 0),
        ("unlocked", "midway", 5),
        ("unlocked", "undone", 0),
        ("synchronized", "undone", 0),
    ],
)
def test_the_money_that_was_debited_is_gone_unless_it_is_put_back(transfer: str, refused: str, lost: int) -> None:
    bank, accounts = way(transfer, refused)
    with pytest.raises(UnknownAccount) as raised:
        bank.transfer(Transfer("x", "nobody", 5))
    assert sum(held(accounts).values()) == 325 - lost
    assert raised.value.writes == {"midway": 1, "undone": 2, "before": 0}[refused]
    bank.transfer(Transfer("y", "z", 10))
    assert bank.audit() == 325 - lost


def test_with_releases_the_lock_and_loses_the_money_in_every_order() -> None:
    explored = search(transfer="with_lock", transfers=UNKNOWN, refused="midway")
    assert explored.orders == 2
    assert broken(explored) == {"invariants_kept": 2}
    lost = seen(explored, "invariants_kept lost_money")
    assert lost.where == "replica 0: 5 in 1 half made"
    assert lost.witness.startswith("replica 0's transfer 0, x:nobody:5, debited x: no account is called nobody\n")
    assert broken(search(transfer="with_lock", transfers=UNKNOWN, refused="undone")) == {}


def test_half_a_transfer_poisons_the_accounts_and_whoever_comes_next_is_told() -> None:
    bank, accounts = way("synchronized", "midway")
    with pytest.raises(UnknownAccount):
        bank.transfer(Transfer("x", "nobody", 5))
    for _ in range(2):
        with pytest.raises(Poisoned, match="no account is called nobody"):
            bank.transfer(Transfer("y", "z", 10))
        with pytest.raises(Poisoned):
            bank.audit()
    assert held(accounts) == {"x": 20, "y": 100, "z": 200}


def test_poison_speaks_through_the_invariant_in_every_order() -> None:
    explored = search(transfer="synchronized", transfers=UNKNOWN, refused="midway")
    assert explored.orders == 2
    assert kinds(explored, "invariants_kept") == {"poisoned": 2}
    assert broken(explored) == {"invariants_kept": 2}
    witness = seen(explored, "invariants_kept poisoned").witness.partition("\n")[0]
    assert "who came later was told, " in witness
    # The last to come may poison, too: then nobody was told, and the accounts are.
    assert broken(search(transfer="synchronized", transfers=UNKNOWN, refused="undone")) == {}


# A lock for each account.


@pytest.mark.parametrize("transfer", ["lock_per_account", "ordered_locks", "acquire_locked"])
def test_opposite_orders_wait_for_each_other_and_one_order_does_not(transfer: str) -> None:
    explored = search(transfer=transfer, transfers=OPPOSITE)
    if transfer != "lock_per_account":
        assert broken(explored) == {}
        return
    assert explored.orders == 6
    assert broken(explored) == {"no_deadlock": 2}
    assert explored.told_deadlock == (
        "replica 0 waits for lock of y, which replica 1 holds; replica 1 waits for lock of x, which replica 0 holds"
    )


def test_a_circle_of_three() -> None:
    explored = search(3, 1, transfer="lock_per_account", transfers=CASES["three"][2])
    assert (explored.orders, explored.counts["no_deadlock"]) == (504, 6)
    assert explored.told_deadlock.count("waits for lock of") == 3


# Auditors.


@pytest.mark.parametrize("transfer", [*SAFE, "bare_lock", "lock_per_account", "unlocked"])
def test_an_auditor_who_does_not_hold_all_locks_sees_money_twice_or_never(transfer: str) -> None:
    explored = search(transfer=transfer, transfers=["x:y:5"], auditors=1)
    torn = {"lock_per_account": (7, 533), "unlocked": (9, 35)}.get(transfer)
    if torn is None:
        assert broken(explored) == {}
        return
    assert (explored.counts["no_torn_reads"], explored.orders) == torn
    assert broken(explored) == {"no_torn_reads": torn[0]}


# Free runs.


@pytest.mark.parametrize("transfer", SAFE)
def test_free_threads_keep_everything_under_each_lock(transfer: str) -> None:
    found = run(3, 150, transfer=transfer, auditors=1)
    assert [name for name, finding in found.items() if name != "metrics" and finding.anomalies] == []
    assert found["no_torn_reads"].evidence == "150 of 150 audits came to 325"
    metrics = found["metrics"]
    assert metrics["transfers_made"] + metrics["transfers_refused"] == 300
    assert metrics["updates_kept"] == metrics["updates_expected"] == 2 * metrics["transfers_made"]
    assert metrics["money"] == 325


@pytest.mark.parametrize("refused", ["midway", "undone"])
def test_free_threads_lose_what_is_debited_and_put_back_what_is_undone(refused: str) -> None:
    found = run(2, 200, transfer="with_lock", refused=refused)
    (lost,) = found["invariants_kept"].anomalies or [None]
    if refused == "undone":
        assert lost is None
        return
    assert lost.kind == "lost_money"
    assert lost.count == 325 - found["metrics"]["money"] > 0
    assert found["no_lost_updates"].anomalies == []


def test_two_that_have_both_read_lose_one_update_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: everybody has read before anybody writes."""
    meeting = threading.Barrier(2, timeout=WAIT)
    read = Account.read

    def read_and_meet(self: Account) -> Any:
        found = read(self)
        meeting.wait()
        return found

    monkeypatch.setattr(Account, "read", read_and_meet)
    found = run(2, 3, transfer="unlocked", transfers=["x:y:1"])
    (lost,) = found["no_lost_updates"].anomalies
    assert (lost.kind, lost.count, lost.of) == ("overwritten_update", 6, 12)
    assert found["metrics"]["updates_kept"] == 6
    assert found["no_deadlock"].anomalies == []


def test_a_total_that_lost_money_says_nothing_of_reads() -> None:
    found = run(3, 100, transfer="with_lock", refused="midway", auditors=1)
    assert not found["no_torn_reads"].checked
    assert found["invariants_kept"].anomalies


def stuck(**keys: Any) -> RunBroken:
    began = time.monotonic()
    with pytest.raises(RunBroken) as raised:
        run(**keys)
    # 0.1 s after it has come about; the watchdog, which looks at steps only, would take 120 s.
    assert time.monotonic() - began < WAIT
    assert raised.value.kind == "deadlock"
    return raised.value


def test_the_deadlock_after_an_exception_is_told_with_the_holders_stack() -> None:
    told, acquired = stuck(num_replicas=3, transfer="bare_lock", refused="midway").message.split("\n", 1)
    own = told.partition(" waits")[0]
    # Others wait behind, those that had come to it by then.
    assert told.startswith(f"{own} waits for the bank's lock, which it holds itself")
    assert acquired.startswith(f"{own} acquired the bank's lock at\n")
    assert "in transfer\n    self._lock.acquire()" in acquired


def test_the_deadlock_of_opposite_orders_is_told_as_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: both have their first lock before either asks for its second."""
    meeting, met = threading.Barrier(2, timeout=WAIT), set()

    class Meets:
        def __init__(self, lock: Any) -> None:
            self._lock = lock

        def __enter__(self) -> None:
            self._lock.__enter__()
            if threading.get_ident() not in met:
                met.add(threading.get_ident())
                meeting.wait()

        def __exit__(self, *error: Any) -> None:
            self._lock.__exit__(*error)

    from trainer.workloads.bank import transfers

    make = transfers.Lock
    monkeypatch.setattr(transfers, "Lock", lambda name: Meets(make(name)))
    told = stuck(steps=1, transfer="lock_per_account", transfers=OPPOSITE).message.split("\n")[0]
    assert sorted(told.removesuffix(".").split("; ")) == [
        "replica 0 waits for lock of y, which replica 1 holds",
        "replica 1 waits for lock of x, which replica 0 holds",
    ]


# What replicas are to transfer.


def test_drawn_transfers_are_the_same_for_the_same_seed_and_have_their_share_of_faults() -> None:
    bank = Bank(unknown=0.2, overdrafts=0.1)

    def drawn(own: int, seed: int, number: int = 2000) -> list[Transfer]:
        stream = plan.transfers(bank, own, 2, seed)
        return [next(stream) for _ in range(number)]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)
    found = drawn(0, 0)
    assert 0.17 < sum(each.destination == plan.NOBODY for each in found) / 2000 < 0.23
    assert 0.08 < sum(each.amount > 325 for each in found) / 2000 < 0.12
    assert all(each.source != each.destination and each.amount >= 1 for each in found)


def test_listed_transfers_are_taken_in_turn() -> None:
    bank = Bank(transfers=["x:y:1", "y:z:2", "z:x:3"])
    first, second = (plan.transfers(bank, own, 2, 0) for own in range(2))
    assert [next(stream).amount for _ in range(3) for stream in (first, second)] == [1, 2, 3, 1, 2, 3]


# Through the command.


@pytest.mark.slow
def test_a_deadlock_ends_the_command_with_3_and_its_log_has_the_stacks(command: Command) -> None:
    ended = command("experiment=bank_bare_lock", "hydra.run.dir=run")
    assert ended.returncode == 3, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    assert (found["verdict"], found["error"]["kind"]) == ("broken", "deadlock")
    assert "which it holds itself; replica" in found["error"]["message"]
    log = (command.folder / "run" / "console.log").read_text()
    for part in ("acquired the bank's lock at\n", "waits for the bank's lock at\n", "self._lock.acquire()"):
        assert part in log
    assert found["run"]["duration_seconds"] < WAIT


@pytest.mark.slow
def test_an_order_that_is_stuck_is_found_by_search_and_ends_its_replay_with_3(command: Command) -> None:
    case = ("experiment=bank_opposite_orders", "train.steps=1", "workload.transfers=[x:y:5,y:x:10]")
    ended = command(*case, "schedule=search", "hydra.run.dir=run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    (deadlock,) = found["anomalies"]
    assert (found["verdict"], deadlock["kind"], deadlock["count"], deadlock["of"]) == ("anomaly", "deadlock", 2, 6)
    token = deadlock["replay"].rpartition("schedule.token=")[2]
    again = command(*case, "schedule=replay", f"schedule.token={token}", "hydra.run.dir=again")
    assert again.returncode == 3, again.stdout + again.stderr
    error = verdict(command.folder / "again")["error"]
    assert error["kind"] == "deadlock"
    assert error["message"] == deadlock["witness"].partition("\n")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "word", "anomalies"),
    [
        ("bank_with_statement", "anomaly", {"lost_money"}),
        ("bank_synchronized", "anomaly", {"poisoned"}),
        ("synchronized_bank", "upheld", set()),
    ],
)
def test_what_the_experiments_come_to(command: Command, experiment: str, word: str, anomalies: set[str]) -> None:
    ended = command(f"experiment={experiment}", "hydra.run.dir=run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    assert found["verdict"] == word
    assert {each["kind"] for each in found["anomalies"]} == anomalies
    assert found["run"]["engine"] == "python"


def test_every_way_is_claimed_for_and_each_experiment_is_a_bank() -> None:
    assert set(rules.TRANSFERS) == set(WAYS)
    assert set(rules.REFUSED) == set(CHANGES)
    assert set(rules.LOOK_UP_FIRST) < set(WAYS)
    named = [name for name in experiments() if name.startswith("bank_")]
    assert len(named) == 6


HEEDS_NOT = "does not go with workload=bank"
REFUSED = [
    (["workload.transfer=with_locks"], "workload.transfer must be one of unlocked, bare_lock, with_lock, synchronized, "
     "lock_per_account, ordered_locks, acquire_locked; got 'with_locks'. Did you mean 'with_lock'?"),
    (["workload.refused=late"], "workload.refused must be one of before, midway, undone; got 'late'."),
    (["workload.transfer=acquire_locked", "workload.refused=midway"],
     "workload.refused=midway does not go with workload.transfer=acquire_locked, which looks both accounts up before "
     "it acquires anything. It goes with unlocked, bare_lock, with_lock, synchronized."),
    (["workload.accounts=[x:5]"], "workload.accounts must list at least 2 accounts; got 1."),
    (["workload.accounts=[x:5,x:6]"], "workload.accounts must list NAME:BALANCE, each name once and none 'nobody', as "
     "in [x:25,y:100]; got 'x:6'."),
    (["workload.transfers=[x:x:5]"], "workload.transfers must list SOURCE:DESTINATION:AMOUNT, two names and at least "
     "1, as in [x:y:5]; got 'x:x:5'."),
    (["workload.unknown=1.5"], "workload.unknown must be from 0 to 1; got 1.5."),
    (["workload.unknown=0.6", "workload.overdrafts=0.6"], "workload.unknown and workload.overdrafts must be at most 1 "
     "together; got 0.6 and 0.6."),
    (["workload.auditors=2"], "workload.auditors must be from 0 to num_replicas - 1; got 2."),
    (["schedule=search", "schedule.granularity=memory"], "schedule.granularity=memory does not go with workload=bank: "
     "a balance has no pieces."),
    (["audit.repeat=2"], "audit.repeat=2 needs schedule=replay under workload=bank. Leave audit.repeat out."),
    (["update_mode=locked"], f"update_mode=locked {HEEDS_NOT}, which does not heed it. Leave it out."),
    (["strategy=mirrored"], "workload=bank needs strategy=threads: under mirrored one replica's Python code runs at a "
     "time."),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_a_bank_cannot_be_is_refused_in_one_line(command: Command, arguments: list[str], message: str) -> None:
    ended = command("workload=bank", *arguments)
    assert (ended.returncode, ended.stderr) == (2, f"trainer: {message}\n")
    assert command.left() == []
