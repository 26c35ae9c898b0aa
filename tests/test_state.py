"""State holders by themselves, in forced orders: the unsafe one breaks, its safe twin does not, by the same body."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import ops

from models.dropout import Dropout
from models.random import Key, drawing
from trainer.config import Config, Linear, Train
from trainer.state.cursor import Sharded, SharedIterator
from trainer.state.first_call import FIRST_CALLS
from trainer.state.gradients import PerReplica, SharedGrad
from trainer.state.layout import plan
from trainer.state.loss_scale import next_state, skips
from trainer.state.mechanisms import HOLDERS
from trainer.state.precision import PRECISION_HOLDERS
from trainer.state.random_numbers import Generated
from trainer.strategies.steps import Steps
from trainer.updates import optimizers
from trainer.updates.apart import Apart
from trainer.updates.shared_vector import SharedVector
from trainer.updates.transactions import Locked
from trainer.workloads.policy import AskingPolicy
from trainer.workloads.train import Training

WAIT = 20.0
MODES = [name for name in HOLDERS["precision"] if name != "explicit"]  # explicit has no mode to hold


class Turns:
    """Lets threads act in one given order: each waits until it is its turn."""

    def __init__(self, *order: str) -> None:
        self._order = list(order)
        self._changed = threading.Condition()

    def take(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._order[:1] == [name], WAIT), f"{name} never came"

    def done(self) -> None:
        with self._changed:
            self._order.pop(0)
            self._changed.notify_all()


def side_by_side(*bodies: Callable[[], Any]) -> list[Any]:
    """Run each body in a thread of its own; what they return, or the first error."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [future.result(WAIT) for future in [pool.submit(body) for body in bodies]]


# Precision.


@pytest.mark.parametrize("name", MODES)
def test_overlapping_scopes_of_two_replicas(name: str) -> None:
    """A enters, B enters, A leaves, B computes, B leaves: B still has its mode, and none is left on; or not."""
    holder = PRECISION_HOLDERS[name]()
    turns = Turns("A in", "B in", "A out", "B computes", "B out")

    def replica(own: str) -> str | None:
        turns.take(f"{own} in")
        with holder.scope("bfloat16"):
            turns.done()
            if own == "B":
                turns.take("B computes")
                found = holder.current()
                turns.done()
            turns.take(f"{own} out")
        turns.done()
        return found if own == "B" else None

    runners = [holder.hand_over() for _ in range(2)]
    _, computed = side_by_side(lambda: runners[0](lambda: replica("A")), lambda: runners[1](lambda: replica("B")))
    isolated = HOLDERS["precision"][name].safe in ("always", "replica")
    assert (computed, holder.current()) == (("bfloat16", None) if isolated else (None, "bfloat16"))


@pytest.mark.parametrize("name", MODES)
def test_what_main_turns_on_in_a_replica_that_main_starts(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    with holder.scope("bfloat16"):
        runner = holder.hand_over()
        (found,) = side_by_side(lambda: runner(holder.current))
    assert found == (None if name == "thread_local" else "bfloat16")


def test_a_replica_that_inherits_keeps_what_it_sets_to_itself() -> None:
    holder = PRECISION_HOLDERS["inherited"]()
    turns = Turns("one sets", "other looks", "one leaves")

    def one() -> None:
        turns.take("one sets")
        with holder.scope("float32"):
            turns.done()
            turns.take("one leaves")

    def other() -> str | None:
        turns.take("other looks")
        found = holder.current()
        turns.done()
        return found

    with holder.scope("bfloat16"):
        runners = [holder.hand_over() for _ in range(2)]
        found = side_by_side(lambda: runners[0](one), lambda: runners[1](other))
        assert found == [None, "bfloat16"]
        assert holder.current() == "bfloat16"


@pytest.mark.parametrize("name", MODES)
def test_a_scope_ends_where_its_body_raises(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    with holder.scope("float16"):
        with pytest.raises(KeyError), holder.scope("bfloat16"):
            raise KeyError
        assert holder.current() == "float16"
    assert holder.current() is None


def test_one_built_model_computes_in_what_each_caller_holds() -> None:
    holder = PRECISION_HOLDERS["inherited"]()
    dense = keras.layers.Dense(4, dtype=AskingPolicy(holder.current))
    dense.build((None, 3))
    x = np.ones((2, 3), np.float32)
    assert {weight.dtype for weight in dense.weights} == {"float32"}
    assert dense(x).dtype == torch.float32
    for dtype in ("bfloat16", "float16"):
        with holder.scope(dtype):
            assert dense(x).dtype == getattr(torch, dtype)


# First call.


@pytest.mark.parametrize("name", [name for name in FIRST_CALLS if name != "double_checked"])
def test_two_replicas_that_call_for_the_first_time_at_once(name: str) -> None:
    first_call, inside = FIRST_CALLS[name](object()), threading.Barrier(2, timeout=WAIT)

    def replica() -> bool:
        with first_call.call() as first:
            inside.wait()  # both are in the call before either is through
        return first

    first = side_by_side(replica, replica)
    assert first == ([False, False] if HOLDERS["first_call"][name].safe == "always" else [True, True])
    with first_call.call() as again:
        assert not again


def test_checked_twice_the_second_replica_waits_for_the_first_call_and_does_not_make_it() -> None:
    first_call, entered, leave = FIRST_CALLS["double_checked"](object()), threading.Event(), threading.Event()

    def one() -> bool:
        with first_call.call() as first:
            entered.set()
            assert leave.wait(WAIT)
        return first

    def other() -> bool:
        assert entered.wait(WAIT)
        threading.Timer(0.05, leave.set).start()
        with first_call.call() as first:
            assert leave.is_set(), "went in while the first call was under way"
        return first

    assert side_by_side(one, other) == [True, False]


# Loss scale.


def overflow_patterns() -> Iterator[list[bool]]:
    random = np.random.default_rng(0)
    yield [False] * 12
    yield [True] * 6
    for share in (0.1, 0.3, 0.5):
        yield (random.random(60) < share).tolist()


@pytest.mark.parametrize("overflows", list(overflow_patterns()), ids=lambda pattern: f"{sum(pattern)}of{len(pattern)}")
@pytest.mark.parametrize("growth_steps", [1, 3, 5])
def test_the_scale_goes_the_way_of_keras_and_torch(overflows: list[bool], growth_steps: int) -> None:
    scale, good, ours = np.float32(2.0**15), np.float32(0), []
    for overflow in overflows:
        ours.append(float(scale))
        scale, good = next_state(scale, good, skips(np.float32(overflow)), growth_steps)

    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.0), initial_scale=2.0**15, dynamic_growth_steps=growth_steps
    )
    variable = keras.Variable(np.zeros(2, np.float32))
    optimizer.build([variable])
    parameter = torch.nn.Parameter(torch.zeros(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=growth_steps)
    sgd = torch.optim.SGD([parameter], 0.0)
    theirs: dict[str, list[float]] = {"keras": [], "torch": []}
    for overflow in overflows:
        theirs["keras"].append(float(optimizer.dynamic_scale.value))
        theirs["torch"].append(scaler.get_scale())
        value = float("inf") if overflow else 1.0
        optimizer.apply([ops.full((2,), value)], [variable])
        scaler.scale(parameter.sum())
        parameter.grad = torch.full((2,), value)
        scaler.step(sgd)
        scaler.update()
    assert ours == theirs["torch"] == theirs["keras"]


def test_an_overflow_of_several_replicas_is_skipped_once() -> None:
    for count in range(4):
        assert float(skips(np.float32(count))) == float(count > 0)
        assert float(skips(torch.tensor(float(count)))) == float(count > 0)


class Written:
    """Two replicas' updates of a weight, a statistic and the loss scale, under `locked`."""

    def __init__(self, apart: frozenset[str]) -> None:
        rule = optimizers.Sgd(1.0)
        self.layout = plan(
            [("kernel", (3,))],
            [("mean", (2,))],
            rule.slots,
            counter=False,
            num_replicas=2,
            loss_scale=True,
            apart=apart,
        )
        initial = self.layout.pack([np.zeros(3), np.zeros(2), np.array([1024.0, 0.0])])
        self.shared = SharedVector(initial, self.layout, rule, growth_steps=2)
        self.replicas = [self.shared.replica(own, whole=False) for own in range(2)]
        self.mode = Locked(self.shared, self.replicas)
        self.apart = Apart(self.shared)

    def update(self, own: int, overflow: bool, after_read: Callable[[], None]) -> None:
        def compute(replica: Any) -> None:
            after_read()
            vector = self.layout.own_canaries(own)
            if overflow:
                vector[self.layout.loss_scale.start] = 1
            else:
                for segment in self.layout.read_segments[:2]:
                    vector[segment.span] = 1.0
            replica.contribution = torch.from_numpy(vector)
            self.apart.take(replica)

        self.mode.step(self.replicas[own], compute)
        self.apart.write(self.replicas[own])

    def value(self, row: int) -> list[float]:
        values: list[float] = self.shared.vector.numpy()[self.layout.segments[row].span].tolist()
        return values

    def counted(self, row: int) -> list[float]:
        counts: list[float] = self.shared.vector.numpy()[self.layout.canaries[row]].min(axis=0).tolist()
        return counts


@pytest.mark.parametrize("shared", [False, True])
def test_two_decisions_from_one_reading_of_scale_and_statistics(shared: bool) -> None:
    """Both have read before either writes: in the transaction both count, outside of it the first is undone."""
    case = Written(frozenset({"statistic", "loss_scale"}) if shared else frozenset())
    inner: list[bool] = []

    def other_first() -> None:
        if not inner:  # once: the other replica's whole update falls between this one's reading and writing
            inner.append(True)
            case.update(1, overflow=True, after_read=lambda: None)

    case.update(0, overflow=False, after_read=other_first)
    weight, mean, scale = range(3)
    assert case.counted(weight) == [1, 1]
    assert case.value(weight) == [-1.0] * 3  # replica 1 overflowed: its update was skipped, and it counts all the same
    assert case.counted(mean) == case.counted(scale) == ([1, 0] if shared else [1, 1])
    assert case.value(scale) == ([1024.0, 1.0] if shared else [512.0, 1.0])
    assert case.value(mean) == [1.0, 1.0]


# Gradients.


@pytest.mark.parametrize("shared", [False, True])
def test_a_backward_pass_that_falls_into_anothers(shared: bool) -> None:
    layout = plan([("kernel", (3,))], [], (), counter=False, num_replicas=2)
    holder = SharedGrad(layout) if shared else PerReplica()
    weights = [torch.zeros(3)]

    def plain(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        return (leaves[0] * 10.0).sum(), None

    def interrupted(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, None]:
        loss = (leaves[0] * 1.0).sum()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(holder.differentiate, plain, weights).result(WAIT)
        return loss, None

    _, _, (alone,) = holder.differentiate(plain, weights)
    assert alone.tolist() == [10.0] * 3
    assert not holder.mixed()
    _, _, (gradient,) = holder.differentiate(interrupted, weights)
    assert gradient.tolist() == ([11.0] * 3 if shared else [1.0] * 3)
    assert holder.mixed() == (True if shared else None)


# Random numbers.


@pytest.mark.parametrize("derived", [True, False])
def test_masks_when_replicas_come_in_another_order(derived: bool) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(0, 2**32, shape, dtype=torch.int64, generator=generator)

    def masks(order: list[int]) -> dict[int, np.ndarray]:
        generator.manual_seed(3)
        found = {}
        for own in order:
            samples = torch.arange(own * 4, own * 4 + 4)
            with drawing(Key(3, torch.tensor(0), samples) if derived else Generated(draw)):
                found[own] = Dropout(0.5, 0)(torch.ones(4, 16), training=True).numpy()
        return found

    one, other = masks([0, 1]), masks([1, 0])
    assert all(np.array_equal(one[own], other[own]) for own in range(2)) == derived
    assert not np.array_equal(one[0], one[1])


def test_a_key_of_many_steps_gives_what_each_steps_key_gives() -> None:
    steps, samples = np.arange(5), np.arange(10, 15)
    together = Key(1, ops.convert_to_tensor(steps), ops.convert_to_tensor(samples))
    found = together.bits(layer_index=2, num_elements=3, batch=5).numpy()
    for row, (step, sample) in enumerate(zip(steps.tolist(), samples, strict=True)):
        key = Key(1, step, ops.convert_to_tensor(np.array([sample])))
        np.testing.assert_array_equal(found[row : row + 1], key.bits(layer_index=2, num_elements=3, batch=1).numpy())


# Evaluators.


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own
@pytest.mark.parametrize("capture", ["always", "never"])
def test_what_an_evaluator_contributes_is_its_own_to_write_to(capture: str) -> None:
    config = Config(num_replicas=2, train=Train(evaluators=1, batch_size=4, capture=capture), model=Linear())
    training = Training(config)
    steps = Steps(config, training)
    prefix = torch.from_numpy(training.initial[: training.layout.read_size].copy())
    for _ in range(2):  # the second time it must be whole again
        with torch.no_grad():
            contribution, _ = steps.take(1, prefix, torch.tensor(0), torch.arange(4), "float32")
        np.testing.assert_array_equal(contribution.numpy(), training.layout.own_canaries(1))
        contribution.zero_()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own
@pytest.mark.parametrize("capture", ["always", "never"])
def test_an_evaluator_mixes_no_gradients_for_it_has_none(capture: str) -> None:
    config = Config(num_replicas=2, train=Train(evaluators=1, batch_size=4, capture=capture), model=Linear())
    training = Training(config)
    steps = Steps(config, training)
    steps.gradients = SharedGrad(training.layout)
    prefix = torch.from_numpy(training.initial[: training.layout.read_size].copy())
    for own, mixed in ((1, None), (0, False)):
        with torch.no_grad():
            steps.take(own, prefix, torch.tensor(0), torch.arange(4), "float32")
        assert steps.gradients.mixed() is mixed


# Cursor.


@pytest.mark.parametrize("shared", [False, True])
def test_two_replicas_that_fetch_at_once(shared: bool) -> None:
    both = threading.Barrier(2, timeout=WAIT)

    def fetch(number: int) -> int:
        both.wait()  # the other has looked at the position, too
        return number

    cursor = SharedIterator(fetch, 8) if shared else Sharded(fetch, 2)
    taken = side_by_side(lambda: cursor.take(0, 0), lambda: cursor.take(1, 0))
    assert sorted(taken) == ([(0, 0), (0, 0)] if shared else [(0, 0), (1, 1)])


@pytest.mark.parametrize("shared", [False, True])
def test_replicas_that_take_turns_get_every_batch_once(shared: bool) -> None:
    cursor = SharedIterator(lambda number: number, 8) if shared else Sharded(lambda number: number, 2)
    taken = [cursor.take(own, step)[0] for step in range(4) for own in range(2)]
    assert taken == list(range(8))


def test_every_key_of_the_table_has_code_and_a_safe_mechanism_first() -> None:
    assert set(PRECISION_HOLDERS) == set(HOLDERS["precision"])
    assert set(FIRST_CALLS) == set(HOLDERS["first_call"])
    for mechanisms in HOLDERS.values():
        assert next(iter(mechanisms.values())).safe == "always"
        assert all(bool(held.remedy) == (held.safe != "always") for held in mechanisms.values())
        assert all(bool(held.not_elsewhere) == (len(held.strategies) == 1) for held in mechanisms.values())
