"""Tokens of one step are the rows that the view has, to the last bit, though they are computed apart from it."""

from __future__ import annotations

import itertools

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collectors import open_run
from collectors.encoding import encode, read_where
from collectors.formulas import derivation
from collectors.schema import TOKEN_SCHEMA, VOCABULARY_SCHEMA
from collectors.storage import LocalStorage
from collectors.token_view import COLUMNS, TokenView, pinned
from collectors.views import SCHEMAS, base_view, public_views
from mhpo_core import Sequences, objectives
from tests.collectors.support import new_recorder, token_batch

ODD = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 88.7, -104.0, 1e-8], np.float32)
VOCABULARY = pa.table({"token_id": [7, 3, 5], "token": ["seven", "three", "five"]}, schema=VOCABULARY_SCHEMA)


def _described(name, **hyperparameters):
    made = objectives.create(name, **hyperparameters)
    return {"name": made.name, "hyperparameters": made.hyperparameters()}


DERIVING = [name for name in objectives.OBJECTIVES if derivation(_described(name)).columns]
SETTINGS = [
    {"columns": columns, "precision": precision}
    for columns, precision in itertools.product(("full", "minimal"), ("exact", "compact"))
]


def _rows(n, seed, step=4, nulls=0.2):
    """Tokens in no order; every float column has odd values and NULLs."""
    rng = np.random.default_rng(seed)
    columns = {
        "step": np.full(n, step), "attempt": np.zeros(n), "sequence_id": rng.integers(0, 20, n),
        "position": rng.permutation(n) + n * seed, "kept_because": np.array(["ring", "sample"])[rng.integers(0, 2, n)],
    }  # fmt: skip
    found = {name: pa.array(values) for name, values in columns.items()}
    found["token_id"] = pa.array(rng.integers(0, 9, n), mask=rng.random(n) < nulls)
    for name in TOKEN_SCHEMA.names:
        if name not in found:
            values = (rng.normal(size=n) * 10.0 ** rng.integers(-6, 3, n)).astype(np.float32)
            values = np.where(rng.random(n) < 0.2, rng.choice(ODD, n), values)
            found[name] = pa.array(values, mask=rng.random(n) < nulls)
    return pa.table({name: found[name].cast(TOKEN_SCHEMA.field(name).type) for name in TOKEN_SCHEMA.names})


def _of_the_view(manifest, **sources):
    with duckdb.connect() as connection:
        for name in SCHEMAS:
            connection.register(f"files_{name}", sources.get(name, SCHEMAS[name].empty_table()))
            connection.execute(base_view(name, f"files_{name}"))
        for statement in public_views(manifest, attempts=False, ranks=False):
            connection.execute(statement)
        return connection.sql("FROM tokens ORDER BY sequence_id, position").to_arrow_table()


def _assert_same(found, expected):
    assert found.schema == expected.schema and found.column_names == list(COLUMNS)
    for name in COLUMNS:
        ours, theirs = (table[name].combine_chunks() for table in (found, expected))
        assert ours.is_null().equals(theirs.is_null()), name
        if pa.types.is_floating(ours.type):  # NaN is NaN, whatever its bits
            bits = [np.where(np.isnan(v), np.nan, v).view(np.int32) for v in (ours.fill_null(0), theirs.fill_null(0))]
            np.testing.assert_array_equal(*bits, err_msg=name)
        else:
            assert ours.equals(theirs), name


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("name", [*DERIVING, "grpo"])
def test_every_column_is_that_of_the_view(name, settings):
    manifest = {"objective": _described(name), "store": settings}
    kept, ring, held = _rows(3000, 0), _rows(3000, 1), _rows(3000, 2, nulls=1)
    found = TokenView(manifest, VOCABULARY).of(pa.concat_tables([kept, ring, pinned(held)]))
    sources = {"raw_tokens": kept, "ring_tokens": ring, "pinned_tokens": held, "vocabulary": VOCABULARY}
    expected = _of_the_view(manifest, **sources)
    _assert_same(found, expected)


def test_objectives_that_derive_columns_are_known_and_one_around_another_is_like_it():
    assert {"mhpo", "mhpo_sa", "mhpo_lfm_only", "mhpo_dhp_only"} <= set(DERIVING)
    manifest, rows = {"objective": _described("opsm_ppo", base="mhpo")}, _rows(1000, 3)
    _assert_same(TokenView(manifest, None).of(rows), _of_the_view(manifest, raw_tokens=rows))


def test_no_rows_and_an_empty_vocabulary_are_no_case_of_their_own():
    manifest = {"objective": _described("mhpo")}
    for vocabulary in (None, VOCABULARY_SCHEMA.empty_table(), VOCABULARY):
        _assert_same(TokenView(manifest, vocabulary).of(TOKEN_SCHEMA.empty_table()), _of_the_view(manifest))


def test_tokens_of_finds_every_completion_wherever_it_lies(tmp_path, monkeypatch):
    """Kept, in the ring and pinned; in files of several steps whose row groups begin in the middle of a completion."""
    monkeypatch.setattr("collectors.store.SEAL_AFTER_STEPS", 3)
    monkeypatch.setattr("collectors.encoding._OPTIONS", _small_groups())
    with new_recorder(tmp_path / "run", tokens="flight:3", vocabulary={1: "one", 2: "two"}) as recorder:
        for step in range(8):
            ids = np.random.default_rng(step).permutation(64)
            recorder.record(step, token_batch(step, 64), sequences=Sequences(sequence_id=ids))
            if step == 4:
                recorder.pin("asked for", after=1)
    with open_run(tmp_path / "run") as run:
        order = "ORDER BY sequence_id, position"
        for step in (*range(8), 99):
            of_step = run.sql(f"FROM tokens WHERE step = {step} {order}").to_arrow_table()
            _assert_same(run.tokens_of(step), of_step)
            for sequence in (0, 17, 63, 64):
                expected = run.sql(f"FROM tokens WHERE step = {step} AND sequence_id = {sequence} {order}")
                _assert_same(run.tokens_of(step, sequence), expected.to_arrow_table())


def _small_groups():
    from collectors import encoding

    return encoding._OPTIONS | {"row_group_size": 100, "max_rows_per_page": 100}


def test_a_completion_is_read_from_the_row_groups_that_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr("collectors.encoding._OPTIONS", _small_groups())
    rows = pa.concat_tables([_rows(150, step, step) for step in (3, 4, 5)])
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "file").write_bytes(encode(rows, "tokens"))
    opened = []
    read = pq.ParquetFile.read_row_group

    def noted(self, group, *args, **options):
        opened.append(group)
        return read(self, group, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    found = read_where(LocalStorage(tmp_path), "tokens/file", {"step": 5})
    assert set(opened) == {3, 4} and found.schema == TOKEN_SCHEMA
    for name in TOKEN_SCHEMA.names:
        assert list(map(str, found[name].to_pylist())) == list(map(str, rows[name].slice(300).to_pylist()))
    assert read_where(LocalStorage(tmp_path), "tokens/file", {"step": 6}, ["step"]).schema.names == ["step"]
