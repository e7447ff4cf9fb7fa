import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.training import GroupSettings, OptimizerSettings, clip_gradients

OWNER = {"a.weight": "a", "a.bias": "a", "b.weight": "b", "b.bias": "b", "c.weight": "c"}


def drawn(size=1.0, dtype=torch.float32):
    generator = stream(0, "gradients")
    return {name: size * torch.randn(4, 3, generator=generator).to(dtype) for name in OWNER}


def by_torch(gradients, names, bound):
    parameters = [torch.nn.Parameter(torch.zeros_like(gradients[name])) for name in names]
    for parameter, name in zip(parameters, names, strict=True):
        parameter.grad = gradients[name].clone()
    torch.nn.utils.clip_grad_norm_(parameters, bound)
    return {name: parameter.grad for name, parameter in zip(names, parameters, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_it_is_torchs_rule_for_all_groups_together_and_for_each_with_its_own(size, dtype):
    gradients = drawn(size, dtype)
    settings = OptimizerSettings(clip=0.7, groups={"b": GroupSettings(clip=2.0), "a": GroupSettings(lr=1.0)})
    clipped = clip_gradients(gradients, OWNER, settings)
    wanted = by_torch(gradients, ["a.weight", "a.bias", "c.weight"], 0.7) | by_torch(
        gradients, ["b.weight", "b.bias"], 2.0
    )
    assert list(clipped) == list(gradients)
    for name, tensor in clipped.items():
        assert torch.equal(tensor, wanted[name]) and tensor.dtype == dtype, name
    together = torch.cat([clipped[name].flatten() for name in ("a.weight", "a.bias", "c.weight")]).norm()
    assert float(together) == pytest.approx(min(0.7, float(together))) and (size < 1 or float(together) > 0.69)


def test_a_group_without_a_bound_is_returned_as_it_came():
    gradients = drawn(100.0)
    kept = {name: tensor.clone() for name, tensor in gradients.items()}
    none = clip_gradients(gradients, OWNER, OptimizerSettings())
    assert all(none[name] is gradients[name] for name in gradients)
    one = clip_gradients(gradients, OWNER, OptimizerSettings(groups={"b": GroupSettings(clip=1.0)}))
    assert {name for name in gradients if one[name] is gradients[name]} == {"a.weight", "a.bias", "c.weight"}
    assert all(torch.equal(gradients[name], kept[name]) for name in gradients)  # nothing in place
    assert clip_gradients({}, OWNER, OptimizerSettings(clip=1.0)) == {}


def test_tensors_without_a_gradient_do_not_count():
    gradients = drawn(100.0)
    some = {name: gradients[name] for name in ("a.weight", "c.weight")}
    clipped = clip_gradients(some, OWNER, OptimizerSettings(clip=1.0))
    assert torch.cat([tensor.flatten() for tensor in clipped.values()]).norm() == pytest.approx(1.0, rel=1e-5)


def test_nothing_is_read_back_from_the_device():
    gradients = {name: torch.empty(4, 3, device="meta") for name in OWNER}  # has no values to read
    clipped = clip_gradients(gradients, OWNER, OptimizerSettings(clip=1.0, groups={"b": GroupSettings(clip=1.0)}))
    assert all(tensor.is_meta and tensor.shape == (4, 3) for tensor in clipped.values())
    with pytest.raises(RuntimeError):
        float(gradients["a.weight"].norm())


def test_a_tensor_of_no_group_is_told():
    with pytest.raises(UserError, match=r"^unknown tensor of the optimizer 'a\.wait'; nearest: a\.weight"):
        clip_gradients({"a.wait": torch.ones(1)}, OWNER, OptimizerSettings(clip=1.0))
