import pytest
import torch

from robustlayers.core.device import machine, pick_device, versions
from robustlayers.core.errors import UserError


def test_auto_is_the_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda" and pick_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:"])
def test_an_unknown_device_is_told(name):
    with pytest.raises(UserError, match="unknown device"):
        pick_device(name)


def test_an_absent_mps_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="no MPS"):
        pick_device("mps")


def test_versions_and_machine_say_what_can_change_a_number():
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"python", "robustlayers", "torch", "numpy"}
    assert "1 torch thread" in machine()
