import json
import os
import stat
from pathlib import Path

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.core.files import (
    MANIFEST,
    file_digest,
    read_json,
    read_tensors,
    remove_leftovers,
    verify_manifest,
    write_bytes,
    write_json,
    write_manifest,
    write_tensors,
    write_text,
)

OLD, NEW = b"old content", b"new content, a bit longer"


def test_the_protocol_is_whole_content_flushed_then_replaced_then_the_folder_flushed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def spy_replace(source, target):
        assert Path(source).read_bytes() == NEW and Path(source).parent == Path(target).parent
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    assert write_bytes(tmp_path / "deep" / "file", NEW) == tmp_path / "deep" / "file"
    assert events == ["file", "replace", "folder"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("replace", 1)])
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_at_any_point_leaves_the_old_file_or_the_new_one_whole(
    tmp_path, monkeypatch, error, function, call, there
):
    path = tmp_path / "file"
    if there:
        path.write_bytes(OLD)
    real, calls = getattr(os, function), []

    def failing(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return real(*args)

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(type(error)):
        write_bytes(path, NEW)
    assert len(calls) == call
    after_replace = (function, call) == ("fsync", 2)
    if after_replace:
        assert path.read_bytes() == NEW
    elif there:
        assert path.read_bytes() == OLD
    else:
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if there or after_replace else [])


def test_a_kill_before_the_replace_leaves_the_old_file_and_a_leftover_that_is_cleared(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "run" / "file", OLD)
    write_manifest(tmp_path / "run")

    def killed(*_):
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(OSError):
            write_bytes(path, NEW)
    assert path.read_bytes() == OLD
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert verify_manifest(tmp_path / "run", digests=True) == []
    (tmp_path / "run" / "user.tmp").write_bytes(b"not ours")
    assert remove_leftovers(tmp_path) == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["file", MANIFEST, "user.tmp"]
    assert remove_leftovers(tmp_path) == 0


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    assert write_text(tmp_path / "t", "γ\n").read_bytes() == "γ\n".encode()


def test_json_comes_back_and_what_no_reader_takes_is_refused(tmp_path):
    value = {"b": [1, 0.1, None, True], "a": "γ"}
    assert read_json(write_json(tmp_path / "v.json", value)) == value
    for bad in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "v.json", {"x": bad})
    assert read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_missing_and_damaged_json_names_the_file(tmp_path, content):
    path = tmp_path / "v.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert error.value.faults[0].file == str(path)


def test_tensors_come_back_bit_for_bit(tmp_path):
    shared = torch.arange(6.0)
    tensors = {
        "a.weight": shared.view(2, 3).T,  # not contiguous
        "a.tied": shared,
        "scalar": torch.tensor(-0.0),
        "count": torch.tensor(2**40),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "grad": torch.ones(2, requires_grad=True),
    }
    found = read_tensors(write_tensors(tmp_path / "t", tensors, {"note": "x"}))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        same = [t.detach().contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (found[name], tensor)]
        assert torch.equal(*same), name


def test_a_truncated_or_flipped_tensor_file_is_an_error_of_the_user_and_nothing_else(tmp_path):
    whole = write_tensors(tmp_path / "t", {"a": torch.arange(3.0), "b/c": torch.zeros(2, dtype=torch.int64)})
    data = whole.read_bytes()
    path = tmp_path / "bad"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_tensors(path)
    refused = []
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            read_tensors(path)
        except UserError as error:
            refused += error.faults
    assert len(refused) > len(data) // 3  # those of the header
    assert {fault.file for fault in refused} == {str(path)}
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none")


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "run"
    write_bytes(folder / "rows.json", b"[1, 2]")
    write_bytes(folder / "sub" / "weights", bytes(range(40)))
    write_bytes(folder / ".resume", b"not part of what is kept")
    write_manifest(folder, {})
    return folder


def test_the_manifest_lists_size_and_digest_of_every_file_and_the_facts(finished):
    write_manifest(finished, {"kind": "phase", "seed": 0})
    content = json.loads((finished / MANIFEST).read_text())
    assert content["kind"] == "phase" and content["seed"] == 0
    assert content["files"] == {
        name: {"size": (finished / name).stat().st_size, "sha256": file_digest(finished / name)}
        for name in ("rows.json", "sub/weights")
    }
    assert verify_manifest(finished, digests=True) == []


def test_every_flipped_bit_of_every_listed_file_is_found(finished):
    for name in ("rows.json", "sub/weights"):
        path = finished / name
        data = path.read_bytes()
        for place in range(len(data)):
            for bit in range(8):
                flipped = bytearray(data)
                flipped[place] ^= 1 << bit
                path.write_bytes(flipped)
                faults = verify_manifest(finished, digests=True)
                assert [fault.file for fault in faults] == [str(path)] and "SHA-256" in faults[0].message
        assert verify_manifest(finished) == []  # sizes alone cannot tell
        path.write_bytes(data)
    assert verify_manifest(finished, digests=True) == []


def test_every_flipped_bit_of_the_manifest_is_found_and_none_crashes(finished):
    path = finished / MANIFEST
    data = path.read_bytes()
    for place in range(len(data) - 1):  # all but the line end
        for bit in (0, 2, 5):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            assert verify_manifest(finished, digests=True), (place, bit)


@pytest.mark.parametrize("digests", [True, False])
def test_truncation_growth_and_deletion_are_found_by_size_alone(finished, digests):
    path = finished / "rows.json"
    data = path.read_bytes()
    for other in (b"", data[:-1], data + b"\n"):
        path.write_bytes(other)
        (fault,) = verify_manifest(finished, digests=digests)
        assert fault.file == str(path) and fault.message == f"{len(other)} bytes, manifest says {len(data)}"
    path.unlink()
    (fault,) = verify_manifest(finished, digests=digests)
    assert "missing" in fault.message
    path.mkdir()
    (fault,) = verify_manifest(finished, digests=digests)
    assert "missing" in fault.message


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"files": 3}', '{"files": {"rows.json": 3}}', '{"files": {"rows.json": {"size": 6}}}', "nul"],
)
def test_a_damaged_manifest_is_a_fault_and_not_a_crash(finished, content):
    (finished / MANIFEST).write_text(content)
    (fault,) = verify_manifest(finished)
    assert fault.message == "damaged manifest"


def test_a_folder_without_a_manifest_is_unfinished(finished):
    (finished / MANIFEST).unlink()
    (fault,) = verify_manifest(finished)
    assert "unfinished" in fault.message and fault.file == str(finished)
