import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustlayers.core.identity import canonical, digest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_the_canonical_text_is_json_of_the_same_value_in_plain_ascii(value):
    text = canonical(value)
    assert text.isascii() and "\n" not in text
    again = json.loads(text)
    assert again == value and canonical(again) == text


@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_the_order_of_keys_does_not_matter(value):
    assert canonical(dict(reversed(value.items()))) == canonical(value)


@given(VALUES, VALUES)
def test_different_values_have_different_digests(one, other):
    if canonical(one) != canonical(other):
        assert digest(one) != digest(other)
    else:
        assert one == other


def test_the_digest_is_sha256_of_the_canonical_text():
    assert digest({"b": 1, "a": [0.1]}) == hashlib.sha256(b'{"a":[0.1],"b":1}').hexdigest()
    assert digest([1], 12) == digest([1])[:12]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_what_equals_nothing_has_no_identity(value):
    with pytest.raises(ValueError):
        digest(value)
