"""Who is who among processes; what two of them exchange is tested in training, where they have something to exchange."""

import sys

import pytest
import torch

from robustlayers.core.device import pick_device
from robustlayers.core.errors import UserError
from robustlayers.core.ranks import ALONE, Lost, Ranks, environment, joined


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert environment() == (0, 1)
    alone = Ranks.of_group()
    assert alone.main and alone.count == 1 and alone.first() and alone.tell("x") == "x"
    assert torch.equal(alone.gather(torch.ones(2)), torch.ones(1, 2))


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "many")])
def test_what_torchrun_would_not_set_is_told(rank, size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="let torchrun set them"):
        environment()


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # importing it would fail
    with joined(torch.device("cpu")) as ranks:
        assert ranks is ALONE and torch.equal(ranks.total(torch.ones(2)), torch.ones(2))
        ranks.wait()


def test_a_lost_connection_is_told_in_words(monkeypatch):
    def broken(tensor):
        raise RuntimeError("Read error [127.0.0.1]:2190: Connection reset by peer")

    monkeypatch.setattr("torch.distributed.all_reduce", broken)
    with pytest.raises(Lost, match=r"^another process has ended, or the connection to it is lost$"):
        Ranks(0, 2).total(torch.ones(1))


class Store:
    """A store that counts, or is gone."""

    def __init__(self, gone=False):
        self.count, self.gone = 0, gone

    def add(self, key, amount):
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        self.count += amount
        return self.count


def test_the_first_to_ask_is_the_first():
    store = Store()
    assert [Ranks(index, 3, store).first() for index in (2, 0, 1)] == [True, False, False]
    gone = Store(gone=True)
    assert [Ranks(index, 2, gone).first() for index in (0, 1)] == [True, False]


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0) and pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"processes on a machine with 2 CUDA device\(s\)"):
        pick_device("auto")


def test_the_main_process_too_waits_for_the_others(monkeypatch):
    """Of a broadcast it would not: it could leave, and close connections, while others are still on their way."""
    import torch.distributed as dist

    made = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: made.append("all_reduce"))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: made.append("broadcast"))
    Ranks(0, 2).wait()
    assert made == ["all_reduce"]
    ALONE.wait()
    assert made == ["all_reduce"]
