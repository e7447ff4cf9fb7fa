"""Models of all kinds for the tests of the crafting forward, and how far it is from the model it stands for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models import build
from robustlayers.normalization import inference

Forward = Callable[[Tensor], Tensor]


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor of norm layers a value that is far from the identity's; fresh layers would hide most faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low, high in (
                    ("weight", -1.5, 1.5),
                    ("bias", -1, 1),
                    ("running_mean", -1, 1),
                    ("running_var", 1e-4, 2),
                ):
                    tensor = getattr(module, name)
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


def both(forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the gradient of an uneven function of them for the images."""
    x = x.detach().clone().requires_grad_()
    logits = forward(x)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    (slope,) = torch.autograd.grad((logits.sin() * weights).sum(), x)
    return logits.detach(), slope


def distance(model: nn.Module, forward: Forward, x: Tensor) -> float:
    """Return the largest difference of logits and of gradients, relative to the largest entry of each."""
    with inference(model):
        wanted = both(model, x)
    found = both(forward, x)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(wanted, found, strict=True))


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Bottleneck(nn.Module):
    """As user code has it: layers reused (one ReLU), in-place ReLU, biases before norms, `+=`, a downsampling path."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(width, eps=1e-2)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, 2 * width, 1, stride), nn.BatchNorm2d(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class UserNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Bottleneck(6, 4, 1), Bottleneck(8, 4, 2))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(self.blocks(self.stem(x)), 0.5, self.training)
        x = self.pool(x)
        return self.fc(x.view(x.size(0), -1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(27, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4, bias=False),
        nn.BatchNorm1d(4, affine=False),
    )  # fmt: skip


CIFAR = {"channels": 3, "classes": 5}
# name -> (make, size of the images, folded, fused)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "resnet-A": (lambda: build("resnet", seed=0, depth=14, width=4, **CIFAR), 9, 13, 1),
    "resnet-B": (lambda: build("resnet", seed=0, depth=8, width=4, shortcut="B", mean=0.4, std=0.2, **CIFAR), 8, 9, 1),
    "resnet-none": (lambda: build("resnet", seed=0, depth=8, width=4, norm="none", **CIFAR), 8, 0, 1),
    "preact": (lambda: build("preact-resnet", seed=0, width=4, **CIFAR), 8, 8, 10),
    "preact-none": (lambda: build("preact-resnet", seed=0, width=4, norm="none", **CIFAR), 8, 0, 1),
    "wide": (lambda: build("wide-resnet", seed=0, depth=10, widen=1, **CIFAR), 8, 3, 5),
    "small-cnn": (lambda: build("small-cnn", seed=0, **CIFAR), 9, 3, 1),
    "user": (UserNet, 8, 9, 0),
    "mlp": (mlp, 3, 2, 0),
}


def case(name: str) -> tuple[nn.Module, Tensor, int, int]:
    """Make a model of that name in float64, images for it, and how many layers fold and fuse."""
    make, size, folded, fused = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = scramble(make())
    return model.double(), images(3, 3, size, size), folded, fused


def small() -> nn.Module:
    """Make a small residual net in float64."""
    return scramble(build("resnet", seed=0, depth=8, width=4, **CIFAR)).double()


X = images(4, 3, 8, 8)
Y = torch.tensor([0, 3, 1, 4])
