"""What a kill may not spoil: the journal's slots, the log, whole-file writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selbp_study.journal import HEADER, Journal, decode, encode
from selbp_study.storage import JsonLines, StorageError, write_text


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and (a.stride() == b.stride() or a.numel() < 2)
            and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
tensors = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.lists(st.integers(0, 4), max_size=4),
    dtypes,
    st.integers(0, 99),
)
states = st.recursive(
    scalars | tensors,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@given(states)
def test_states_come_back_bit_for_bit(state) -> None:
    text, block = encode(state)
    assert same(decode(text, block.tobytes()), state)


def test_layouts_come_back() -> None:
    state = {"conv": torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last), "nan": torch.tensor(float("nan"))}
    text, block = encode(state)
    assert same(decode(text, block.tobytes()), state)


def test_unknown_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="got object"):
        encode({"a": [object()]})


def state_of(step: int) -> dict:
    return {"step": step, "weights": torch.full((1000,), float(step))}


def test_the_newest_whole_slot_wins(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.read() is None
    for step in range(1, 6):
        journal.write(state_of(step), step)
        assert same(Journal(tmp_path).read(), (state_of(step), step))


@pytest.mark.parametrize("damage", ["header", "text", "tensor", "cut", "empty"])
def test_a_damaged_slot_falls_back_to_the_step_before(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write(state_of(step), step)
    path = tmp_path / Journal.SLOTS[3 % 2]
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "empty":
        data.clear()
    else:
        data[{"header": 10, "text": HEADER.size + 3, "tensor": len(data) - 2000}[damage]] ^= 1
    path.write_bytes(data)
    assert same(Journal(tmp_path).read(), (state_of(2), 2))


@pytest.mark.parametrize("reopened", [False, True], ids=["one run", "a resumed run"])
@pytest.mark.parametrize("every", [1, 2, 7, 200])
def test_a_kill_between_any_two_writes_keeps_the_last_or_the_step_before(
    tmp_path: Path, monkeypatch, every: int, reopened: bool
) -> None:
    """Stop the writer before each of its system calls in turn."""
    whole_write = os.pwrite
    for allowed in range(4):
        folder = tmp_path / str(allowed)
        folder.mkdir()
        journal = Journal(folder)
        for step in (every, 2 * every, 3 * every):
            journal.write(state_of(step), step)
        if reopened:
            journal.close()
            journal = Journal(folder)
            assert same(journal.read(), (state_of(3 * every), 3 * every))
        calls = 0

        def dying(file: int, data: bytes, offset: int, allowed: int = allowed) -> int:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise KeyboardInterrupt
            return whole_write(file, data, offset)

        monkeypatch.setattr(os, "pwrite", dying)
        with pytest.raises(KeyboardInterrupt):
            journal.write(state_of(4 * every), 4 * every)
        monkeypatch.setattr(os, "pwrite", whole_write)
        assert same(Journal(folder).read(), (state_of(3 * every), 3 * every))
        journal.write(state_of(4 * every), 4 * every)
        assert same(Journal(folder).read(), (state_of(4 * every), 4 * every))


def test_the_durable_slot_stands_in_when_both_others_are_lost(tmp_path: Path) -> None:
    journal = Journal(tmp_path, durable_every=0.0)
    journal.write(state_of(1), 1)
    journal.durable_every = 1e9
    journal.write(state_of(2), 2)
    journal.write(state_of(3), 3)
    for name in Journal.SLOTS[:2]:
        (tmp_path / name).write_bytes(b"")
    assert same(Journal(tmp_path).read(), (state_of(1), 1))
    journal.remove()
    assert Journal(tmp_path).read() is None


def test_a_shorter_state_over_a_longer_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write({"x": torch.ones(5000)}, 1)
    journal.write({"x": torch.ones(10)}, 3)
    assert same(Journal(tmp_path).read(), ({"x": torch.ones(10)}, 3))


def test_log_rows_after_the_step_are_cut_and_a_half_line_is_dropped(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.read() == []
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float("inf")})
    with log.path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    assert [row["step"] for row in log.read()] == [1, 2, 3]
    log.cut(2)
    assert [row["step"] for row in log.read()] == [1, 2]
    log.path.write_bytes(b"nonsense\n")
    with pytest.raises(StorageError, match="line 1"):
        log.read()


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
