import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.training import FROZEN, OBJECTIVES, parse_signal, signal_text


def test_every_objective_is_listed_under_its_name_and_reads_known_passes():
    for name, objective in OBJECTIVES.items():
        assert objective.name == name != FROZEN
        assert objective.passes and set(objective.passes) <= {"clean", "adversarial"}


@pytest.mark.parametrize(("name", "source"), [("natural", "clean"), ("adversarial", "adversarial")])
def test_the_plain_objectives_are_cross_entropy_of_their_own_pass(name, source):
    logits = {
        key: torch.randn(5, 3, generator=torch.Generator().manual_seed(i))
        for i, key in enumerate(("clean", "adversarial"))
    }
    y = torch.tensor([0, 1, 2, 0, 1])
    expected = -logits[source].log_softmax(1)[range(5), y].mean()
    assert torch.allclose(OBJECTIVES[name].loss(logits, y), expected)
    assert torch.equal(OBJECTIVES[name].loss(logits, y), functional.cross_entropy(logits[source], y))


def test_signals_are_parsed():
    assert parse_signal("frozen") == {}
    assert parse_signal("natural") == {"natural": 1.0}
    assert parse_signal({"adversarial": "1/2", "natural": 0.5}) == {"adversarial": 0.5, "natural": 0.5}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("advesarial", "unknown signal 'advesarial'; nearest: adversarial"),
        ("frozn", "unknown signal 'frozn'; nearest: frozen"),
        ("", "unknown signal ''"),
        ({}, "a signal is one of natural, adversarial, frozen, or weights of objectives, not {}"),
        (3, "a signal is one of natural, adversarial, frozen, or weights of objectives, not 3"),
        (None, "a signal is one of natural, adversarial, frozen, or weights of objectives, not None"),
        ({"frozen": 1.0}, "unknown objective 'frozen'"),
        ({"naturel": 1.0}, "unknown objective 'naturel'; nearest: natural"),
        ({3: 1.0}, "unknown objective '3'"),
        ({"natural": 0}, "weight of natural: 0 is not positive; leave the objective out instead"),
        ({"natural": -0.5}, "weight of natural: -0.5 is not positive; leave the objective out instead"),
        ({"natural": "x"}, "weight of natural: 'x' is not a number; write 0.03 or 8/255"),
        ({"natural": float("nan")}, "weight of natural: nan is not finite"),
        ({"natural": None}, "weight of natural: None is not a number; write 0.03 or 8/255"),
        ({"natural": True}, "weight of natural: True is not a number; write 0.03 or 8/255"),
    ],
)
def test_a_mistake_is_told(value, message):
    with pytest.raises(UserError) as error:
        parse_signal(value)
    assert str(error.value).startswith(message)


@given(
    st.dictionaries(st.sampled_from(list(OBJECTIVES)), st.floats(0.001, 100).map(lambda w: float(f"{w:g}")), max_size=2)
)
def test_the_text_of_a_signal_says_all_of_it(signal):
    text = signal_text(signal)
    if not signal:
        assert text == FROZEN
    elif text in OBJECTIVES:
        assert signal == {text: 1.0}
    else:
        assert {part.split()[1]: float(part.split()[0]) for part in text.split(" + ")} == signal
