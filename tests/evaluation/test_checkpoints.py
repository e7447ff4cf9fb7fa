"""Weights from elsewhere: safetensors and state_dicts of torch, with the prefixes of wrappers, and nothing that runs code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.core.files import write_tensors
from robustlayers.evaluation.checkpoints import fit_names, load_checkpoint, read_state


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def _state(bits, prefix: str = "") -> tuple[nn.Module, dict[str, Any]]:
    net = _net()
    with torch.no_grad():
        for number, tensor in enumerate(net.state_dict().values()):
            tensor.fill_(number + 1)
    return net, {prefix + name: tensor for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
        lambda state: {"epoch": 3, "model": {"state_dict": state}},
    ],
    ids=["bare", "state_dict", "nested"],
)
def test_a_state_dict_of_torch(tmp_path: Path, bits, prefix, wrap):
    net, state = _state(bits, prefix)
    torch.save(wrap(state), tmp_path / "w.pt")
    other = _net()
    assert load_checkpoint(other, tmp_path / "w.pt") == ()
    assert bits(other) == bits(net)


def test_safetensors_with_names_of_ones_own(tmp_path: Path, bits):
    net, state = _state(bits)
    renamed = {f"backbone.{name}" if name[0] != "3" else f"fc{name[1:]}": tensor for name, tensor in state.items()}
    del renamed["backbone.1.num_batches_tracked"]
    write_tensors(tmp_path / "w.safetensors", renamed)
    other = _net()
    kept = load_checkpoint(other, tmp_path / "w.safetensors", {"backbone": "", "fc": "3"})
    assert kept == ("1.num_batches_tracked",)
    net[1].num_batches_tracked.zero_()  # pyright: ignore
    assert bits(other) == bits(net)
    with pytest.raises(UserError) as caught:
        load_checkpoint(other, tmp_path / "w.safetensors", {"backbone": ""})
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "w.safetensors")) and "missing: 3.weight" in text and "unexpected" in text


def test_a_prefix_goes_only_where_the_model_knows_the_rest():
    one, two = torch.zeros(1), torch.ones(1)
    assert list(fit_names({"model.fc": one, "model.head": two}, ["fc", "model.head"])) == ["fc", "model.head"]
    assert list(fit_names({"models.fc": one}, ["fc"])) == ["models.fc"]
    with pytest.raises(UserError, match="two tensors would be called 'fc'"):
        fit_names({"module.fc": one, "model.fc": two}, ["fc"])


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path, bits):
    net, state = _state(bits)
    torch.save({"state_dict": state, "extra": _Evil(tmp_path / "canary")}, tmp_path / "evil.pth")
    before = bits(net)
    with pytest.raises(UserError, match=r"evil.pth: not readable as tensors alone .*safetensors"):
        load_checkpoint(net, tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists() and bits(net) == before


def test_other_files_are_refused_in_one_line(tmp_path: Path):
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "none.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "text.safetensors").write_text("no")
    for name, said in (
        ("none.pt", r"holds no state_dict; it has 'epoch' \(int\), 'optimizer' \(dict\)"),
        ("tensor.pt", "holds no state_dict; it has a value of type Tensor"),
        ("half.pt", "not readable as tensors alone"),
        ("text.safetensors", "not a whole safetensors file"),
        ("absent.pt", "no such file"),
        ("absent.safetensors", "no such file"),
    ):
        with pytest.raises(UserError, match=rf"{name}: {said}") as caught:
            read_state(tmp_path / name)
        assert "\n" not in str(caught.value)
