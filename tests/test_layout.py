"""The flat vector: values and canaries each have their own place, and shares cover all of it once."""

import numpy as np
import pytest

from trainer.state.layout import CACHE_LINE, Layout, plan


@pytest.fixture(params=[1, 2, 17])
def layout(request: pytest.FixtureRequest) -> Layout:
    weights = [("a", (3, 4)), ("b", (4,)), ("c", (5, 7))]
    return plan(weights, [("moving", (4,))], ("mean", "variance"), counter=True, num_replicas=request.param)


def test_values_and_canaries_never_overlap(layout: Layout) -> None:
    canaries = layout.canaries.reshape(-1)
    assert len(np.unique(canaries)) == len(canaries) == len(layout.segments) * 2 * layout.num_replicas
    assert not layout.is_value[canaries].any()
    assert layout.is_value.sum() == 3 * (12 + 4 + 35) + 4 + 1


def test_every_part_starts_on_a_cache_line_of_its_own(layout: Layout) -> None:
    for segment in layout.segments:
        for start in (segment.start, segment.values, segment.tail, segment.end):
            assert start % CACHE_LINE == 0


def test_a_packed_vector_holds_what_went_in(layout: Layout) -> None:
    values = [np.random.default_rng(0).normal(size=segment.shape).astype("f") for segment in layout.read_segments]
    vector = layout.pack(values)
    for segment, value in zip(layout.read_segments, values, strict=True):
        np.testing.assert_array_equal(vector[segment.span].reshape(segment.shape), value)
    assert layout.kept(vector).tolist() == [0] * layout.num_replicas


def test_slots_and_counter_take_their_canaries_from_a_weight(layout: Layout) -> None:
    names = [segment.name for segment in layout.segments]
    sources = layout.canary_sources
    assert np.array_equal(sources[names.index("c.variance")], layout.canaries[names.index("c")])
    assert np.array_equal(sources[names.index("moving")], layout.canaries[names.index("moving")])
    assert np.array_equal(sources[names.index("iterations")], layout.canaries[names.index("a")])
    assert sources.max() < layout.read_size


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_shares_cover_everything_but_the_counter_once(layout: Layout, count: int) -> None:
    covered = np.zeros(layout.size, int)
    for share in layout.shares(count):
        for span in share.spans:
            covered[span] += 1
    counter = layout.regions["counter"]
    assert (covered[: counter.start] == 1).all()
    assert (covered[counter] == 0).all()


def test_the_digest_sees_values_and_nothing_else(layout: Layout) -> None:
    vector = layout.pack([np.zeros(segment.shape) for segment in layout.read_segments])
    digest = layout.digest(vector)
    vector[layout.canaries.reshape(-1)] = 7
    assert layout.digest(vector) == digest
    vector[layout.segments[0].values] = 1e-30
    assert layout.digest(vector) != digest


def test_kept_is_the_least_of_a_replicas_canaries(layout: Layout) -> None:
    vector = np.zeros(layout.size, np.float32)
    vector[layout.canaries] = 5
    vector[layout.canaries[-1, 1, 0]] = 4
    assert layout.kept(vector).tolist() == [4] + [5] * (layout.num_replicas - 1)
