"""Fuzzing the readers of files from elsewhere: nothing but the documented errors comes out.

python -m pytest tests/test_fuzzing.py                            a few seconds, with fixed seeds
RMJAX_FUZZ_SECONDS=300 python -m pytest tests/test_fuzzing.py     longer, with other seeds each time
"""

import copy
import gzip
import io
import itertools
import json
import os
import random
import struct
import time

import format_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from rmjax.data import formats, sources
from rmjax.data.records import BadRow, Record
from rmjax.models import weight_files

SECONDS = float(os.environ.get("RMJAX_FUZZ_SECONDS", "0"))
CASES = 400  # of each test, where no time is given

# Values that break assumptions: of other types, at the edges of numbers, of lengths and of Unicode.
ODD = (
    *(None, True, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "\0", "\ud800", "\u202e", "a" * 5000, "-100", "NaN", "[]", "{}", '{"a": 1}', "[[1]]", "A", "left"),
    *([], {}, [None], [[]], [{}], {"": ""}, [1, "a"], ["a", "b"], {"role": "user"}, [{"role": "assistant"}]),
)


def cases(name):
    """Random generators: CASES of fixed seeds, or as many as RMJAX_FUZZ_SECONDS has time for."""
    if not SECONDS:
        yield from (random.Random(f"{name} {i}") for i in range(CASES))
        return
    stop = time.monotonic() + SECONDS
    while time.monotonic() < stop:
        seed = random.getrandbits(64)
        print(f"seed {seed}")  # shown by pytest if it fails
        yield random.Random(seed)


# ----------------------------------------------------------------------------------------------------
# safetensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A real file: its header, and the bytes behind it."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"model.{i}.weight": rng.normal(size=(i + 1, 4)).astype(np.float32) for i in range(4)}
    save_file({**arrays, "score.weight": rng.normal(size=4).astype(np.float16)}, path, {"format": "pt"})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header, data, rng):
    """The file of a header, now and then with another length, other bytes, or without its end."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text)
    if rng.random() < 0.2:
        length = rng.choice([0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001])
    raw = bytearray(struct.pack("<Q", max(0, length)) + text + data)
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(min(len(raw), 8 + len(text)))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw) + 1)]) if rng.random() < 0.1 else bytes(raw)


def broken_header(header, data, rng):
    """A header in which something is wrong."""
    header = copy.deepcopy(header)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, end = header[name], len(data)
    what = rng.randrange(9)
    if what == 0:
        entry["data_offsets"] = rng.choice([[0, end + 1], [-4, 4], [8, 0], [end, end], [0], [], [0, 2**70], [0.5, 4]])
    elif what == 1:
        entry["shape"] = rng.choice([[], [-1, -4], [0], [2**32, 2**32], [2**63], ["4"], [4.0], None, 4, [[4]]])
    elif what == 2:
        entry["dtype"] = rng.choice(["F32", "F64", "I64", "BF16", "F8_E4M3", "f32", "", None, 3, "F4"])
    elif what == 3:
        del entry[rng.choice(list(entry))]
    elif what == 4:
        header[rng.choice(["extra", "", "__metadata__"])] = copy.deepcopy(entry)  # two tensors of the same bytes
    elif what == 5:
        header["__metadata__"] = rng.choice([None, [], {"a": 1}, {"a": {"b": "c"}}, "x"])
    elif what == 6:
        text = json.dumps(header)
        return text.replace(f'"{name}"', f'"{name}": {json.dumps(entry)}, "{name}"', 1).encode()  # a key twice
    elif what == 7:
        return rng.choice([b"", b"{", b"[]", b"null", b"NaN", b'{"a": NaN}', b"[" * 99_999, b'{"a":' * 999, b"\xff"])
    else:
        header[name] = rng.choice(ODD[:-1])
    return header


def test_a_broken_weight_file_is_refused_or_read_within_its_bytes(weights, tmp_path):
    header, data = weights
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "model.safetensors"
    for rng in cases("safetensors"):
        text = broken_header(header, data, rng) if rng.random() < 0.85 else header
        path.write_bytes(packed(text, data, rng))
        try:
            tensors = weight_files.open_tensors(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
            continue
        for tensor in tensors.values():
            assert len(tensor.data) <= path.stat().st_size
            if tensor.dtype in weight_files.DTYPES:
                array = tensor.array()
                assert array.nbytes == len(tensor.data) and array.shape == tensor.shape
                np.array(array, copy=True)  # touches every byte
        outcomes["read"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_a_broken_index_is_refused_or_names_files_beside_it(weights, tmp_path):
    header, data = weights
    (tmp_path / "a.safetensors").write_bytes(packed(header, data, random.Random(1)))
    good = {"metadata": {}, "weight_map": dict.fromkeys(header, "a.safetensors")}
    for rng in cases("index"):
        index = mutated(good, rng)
        raw = json.dumps(index).encode()
        if rng.random() < 0.2:
            raw = raw[: rng.randrange(len(raw))]
        (tmp_path / "model.safetensors.index.json").write_bytes(raw)
        try:
            weight_files.open_tensors(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)


# ----------------------------------------------------------------------------------------------------
# Formats


def mutated(value, rng):
    """A value in which one thing is another, gone, doubled or shuffled, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {key: x for key, x in value.items() if key != name}
        return {**value, name: mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        if rng.random() < 0.2:
            return rng.choice([value[:i], value * 2, value[::-1], [*value, rng.choice(ODD)]])
        return [*value[:i], mutated(value[i], rng), *value[i + 1 :]]
    if isinstance(value, str) and value and rng.random() < 0.3:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(["\ud800", "", "\n\n", "Human:", "<extra_id_1>", "\0", value]) + value[i + 1 :]
    return rng.choice(ODD)


ALL_ROWS = {**format_rows.ROWS, **format_rows.NAMED}


@pytest.mark.parametrize("name", ALL_ROWS)
def test_a_broken_row_is_a_bad_row_or_a_record(name):
    layout = formats.detect([ALL_ROWS[name]], name)
    read = 0
    for rng in share_of(name):
        row = ALL_ROWS[name]
        for _ in range(rng.randint(1, 3)):
            row = mutated(row, rng) if isinstance(row, dict) else row
        if not isinstance(row, dict):
            continue
        defects = [] if rng.random() < 0.5 else None
        try:
            records = layout.read(row, source="s", where="f:1", keep=rng.random() < 0.2, defects=defects)
        except BadRow as bad:
            assert bad.detail
            continue
        assert all(isinstance(record, Record) for record in records)
        read += 1
    assert read  # the mutations are not so rough that nothing is read


def share_of(name):
    """The cases of one format; where no time is given, fewer than others have."""
    return cases(name) if SECONDS else itertools.islice(cases(name), CASES // 4)


def test_rows_of_any_shape_have_a_format_or_a_reason():
    for rng in cases("detect"):
        rows = [mutated(rng.choice(list(ALL_ROWS.values())), rng) for _ in range(rng.randint(1, 3))]
        rows = [row for row in rows if isinstance(row, dict)]
        try:
            formats.detect(rows, rng.choice(["auto", *ALL_ROWS]))
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".parquet.gz"])
def test_a_broken_file_is_refused_with_its_name(suffix, tmp_path):
    rows = [ALL_ROWS["pair_text"], ALL_ROWS["pair_text"]] * 20
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    if ".parquet" in suffix:
        pq.write_table(table, buffer)
    elif ".arrow" in suffix:
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
    else:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        buffer.write(text.encode())
    good = gzip.compress(buffer.getvalue()) if suffix.endswith(".gz") else buffer.getvalue()
    path = tmp_path / f"data{suffix}"
    for rng in share_of(suffix):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw[: rng.randrange(1, len(raw))] if rng.random() < 0.3 else raw)
        try:
            assert all(isinstance(row, dict) for _, row in sources.open_source(str(path)))
        except ValueError as error:
            assert path.name in str(error)
