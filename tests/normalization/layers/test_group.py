import pytest
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.models.norms import make_norm
from robustlayers.normalization.layers import group_count


@pytest.mark.parametrize("channels", range(1, 70))
@pytest.mark.parametrize("wanted", [1, 2, 8, 32])
def test_the_count_divides_is_not_more_than_wanted_and_is_never_instance_norm(channels, wanted):
    count = group_count(channels, wanted)
    assert channels % count == 0
    assert 1 <= count <= wanted
    assert channels == 1 or channels // count >= 2
    better = [c for c in range(count + 1, wanted + 1) if channels % c == 0 and channels // c >= 2]
    assert not better


def test_the_options_reach_the_layer(same_as_torch):
    layer = make_norm({"name": "group", "groups": 2}, 6)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == 2
    same_as_torch(layer, nn.GroupNorm(2, 6), 3, 6, 2, 2)


def test_a_count_that_is_none_is_refused():
    with pytest.raises(UserError, match="groups: 0 is not allowed"):
        group_count(8, 0)
