import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number, pixels_text

DECIMAL = r"(?:[0-9]{1,12}(?:\.[0-9]{0,8})?|\.[0-9]{1,8})(?:[eE][+-]?[0-9]{1,3})?"


@given(st.text() | st.text("0123456789./eE+-_ ", max_size=14))
@example("1e999999999")
@example("1/1e999999999")
@example("1e-999999999")
@example("9" * 10_000)
@example("1/" + "9" * 10_000)
@example("1e9999/1e9999")
@example("١/٢")  # other scripts' digits
@example("8/255\n")
@example("0x10")
@example("1_000")
@example("nan")
@example("-inf")
@example("1/0")
@example("0/0.0e5")
@example("")
def test_text_is_a_finite_number_or_an_error_of_the_user(text):
    try:
        value = number(text, "eps")
    except UserError as error:
        (fault,) = error.faults
        assert fault.message.startswith("eps: ") and len(str(fault).splitlines()) == 1
    else:
        assert type(value) is float and math.isfinite(value)
        assert set(text) <= set("0123456789./eE+- \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0") or not text.isascii()


@given(
    st.from_regex(DECIMAL, fullmatch=True), st.none() | st.from_regex(DECIMAL, fullmatch=True), st.sampled_from("+- ")
)
def test_a_number_is_the_float_nearest_to_what_is_written(top, bottom, sign):
    exact = Fraction(top) / (Fraction(bottom) if bottom and Fraction(bottom) else 1) * (-1 if sign == "-" else 1)
    text = f"{sign.strip()}{top}" + (f" / {bottom}" if bottom and Fraction(bottom) else "")
    try:
        expected = float(exact)
    except OverflowError:
        with pytest.raises(UserError, match="not finite"):
            number(text)
    else:
        assert number(text) == expected


def test_pixels_are_exact():
    for k in range(256):
        assert number(f"{k}/255") == k / 255
    assert number("8 / 255") == number(" 8/255 ") == 8 / 255
    assert number("1e-3") == 1e-3 and number(".5") == 0.5 and number("5.") == 5.0 and number("-2/255") == -2 / 255


@pytest.mark.parametrize("value", [0, -3, 0.1, -0.0, 1e-320, 2**60, 2**100])
def test_numbers_stay_what_they_are(value):
    found = number(value)
    assert type(found) is float and found == value and math.copysign(1, found) == math.copysign(1, value)


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}, 1j, b"1", Fraction(1, 2)])
def test_what_is_no_number_is_told(value):
    with pytest.raises(UserError, match=r"is not a number; write 0\.03 or 8/255"):
        number(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400), "1e400", "-1e400"], ids=range(7))
def test_what_is_not_finite_is_told(value):
    with pytest.raises(UserError, match="is not finite"):
        number(value)


def test_whole_pixels_come_back_from_their_text():
    for k in range(256):
        assert number(pixels_text(k / 255)) == k / 255
    assert pixels_text(8 / 255) == "8/255" and pixels_text(0) == "0" and pixels_text(1) == "1"


@given(st.floats(1e-12, 1e6))
def test_the_text_of_a_length_is_right_to_four_digits(value):
    assert number(pixels_text(value)) == pytest.approx(value, rel=5e-4)
