import hashlib
import random
from contextlib import suppress

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from robustlayers.core.random import global_draws, stream, stream_place, stream_seed

PLACES = st.tuples(
    st.integers(0, 2**70),
    st.text(max_size=5),
    st.lists(st.integers(-3, 2**40) | st.text(max_size=3), max_size=4).map(tuple),
)


@given(PLACES, PLACES)
def test_streams_for_different_purposes_have_different_seeds(one, other):
    assume(one != other)
    assert stream_seed(one[0], one[1], *one[2]) != stream_seed(other[0], other[1], *other[2])


@given(PLACES)
def test_a_seed_is_a_function_of_its_arguments_that_torch_takes(place):
    seed = stream_seed(place[0], place[1], *place[2])
    assert 0 <= seed < 2**63 and seed == stream_seed(place[0], place[1], *place[2])
    torch.Generator().manual_seed(seed)


def test_the_seed_is_the_documented_hash_and_so_the_same_in_every_version():
    assert stream_seed(3, "attack", 1, "a") == int(hashlib.sha256(b'[3,"attack",1,"a"]').hexdigest()[:16], 16) >> 1


def test_positions_do_not_run_into_each_other():
    near = [stream_seed(0, "p", *position) for position in ((1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("1,23",))]
    assert len(set(near)) == len(near)


def test_draws_of_neighboring_streams_are_uncorrelated():
    draws = torch.stack([torch.randn(2000, generator=stream(0, "attack", 0, step)) for step in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert float(correlation.abs().max()) < 0.1  # 4.5 standard deviations


def test_a_stream_depends_on_no_other_and_touches_no_global_state():
    alone = torch.rand(5, generator=stream(0, "order", 4))
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    other = stream(0, "attack", 4)
    one = stream(0, "order", 4)
    pieces = []
    for _ in range(5):  # interleaved with draws of another stream
        torch.rand(3, generator=other)
        pieces.append(torch.rand(1, generator=one))
    assert torch.equal(torch.cat(pieces), alone)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state


@given(PLACES, st.booleans())
def test_global_draws_are_those_of_the_seed_and_are_put_back(place, breaks):
    seed = stream_seed(place[0], place[1], *place[2])
    before = torch.get_rng_state()
    found = []
    for _ in range(2):
        with suppress(ZeroDivisionError), global_draws(seed):
            found.append(torch.rand(3))
            if breaks:
                raise ZeroDivisionError
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), before)


def test_the_place_of_a_stream_tells_how_far_it_is_and_moves_nothing():
    generator = stream(0, "attack")
    places = []
    for _ in range(4):
        places += [stream_place(generator), stream_place(generator)]
        torch.rand(1, generator=generator)
    assert places[::2] == places[1::2] and len(set(places)) == 4
    again = stream(0, "attack")
    for _ in range(4):
        torch.rand(1, generator=again)
    assert stream_place(again) == stream_place(generator)
