import pytest
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.selection.inventory import Inventory
from robustlayers.selection.layout import Layout, layout_of


def linear(*_):
    return nn.Linear(2, 2)


def stage(count: int = 1) -> nn.Sequential:
    return nn.Sequential(*map(linear, range(count)))


class Net(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class InputNormalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", Inventory(nn.Linear(1, 1))["bias"].tensor.detach())


def test_a_model_that_knows_its_layout_is_believed():
    model = models.build("wide-resnet", seed=0, depth=10, widen=1)
    assert layout_of(Inventory(model)) == model.layout()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            Net(conv1=linear(), bn1=nn.BatchNorm1d(2), relu=nn.ReLU(), layer1=stage(), layer2=stage(), fc=linear()),
            Layout(("conv1", "bn1"), (("layer1",), ("layer2",)), ("fc",)),
        ),
        (
            Net(stem=linear(), stages=nn.ModuleList([stage(), stage()]), norm=nn.LayerNorm(2), head=linear()),
            Layout(("stem",), (("stages.0",), ("stages.1",)), ("head",)),
        ),
        (
            Net(block_1=stage(), block_2=stage(), classifier=stage(2)),
            Layout((), (("block_1",), ("block_2",)), ("classifier",)),
        ),
        (  # the usual way to put the normalization of the input in front
            nn.Sequential(
                InputNormalize(),
                Net(conv1=linear(), bn1=nn.BatchNorm1d(2, affine=False), layer1=stage(), layer2=stage(), fc=linear()),
            ),
            Layout(("1.conv1", "1.bn1"), (("1.layer1",), ("1.layer2",)), ("1.fc",)),
        ),
        (  # a stage in a stage counts once, and the head is not the `fc` of a block
            Net(conv=linear(), layer1=Net(fc=linear(), block1=stage()), layer2=Net(fc=linear()), out=linear()),
            Layout(("conv",), (("layer1",), ("layer2",)), ("out",)),
        ),
        (nn.Sequential(linear(), nn.ReLU(), linear()), Layout((), (), ("2",))),
        (Net(fc=linear(), logits=linear()), Layout((), (), ("logits",))),
        (Net(fc=linear(), layer1=stage(), deep=Net(fc=linear())), Layout((), (("layer1",),), ("fc",))),
    ],
    ids=range(8),
)
def test_the_usual_names_tell_the_layout(model, expected):
    assert layout_of(Inventory(model)) == expected


def test_twelve_stages_stay_in_order(user):
    assert layout_of(Inventory(user("deep"))).stages == tuple((f"layer{i}",) for i in range(1, 13))


def test_no_head_is_told():
    with pytest.raises(UserError, match=r"^Sequential has no linear layer or module that could be its head$"):
        layout_of(Inventory(nn.Sequential(nn.Conv2d(1, 1, 1))))


def test_a_layout_of_another_kind_is_not_taken_for_ours():
    class Other(nn.Linear):
        def layout(self):
            return {"head": "nothing"}

    assert layout_of(Inventory(nn.Sequential(Other(2, 2)))).head == ("0",)
    assert layout_of(Inventory(Net(fc=Other(2, 2)))).head == ("fc",)
