"""Arrow tables and Parquet files, scored without an engine: layouts, rows and files that are bad, starting again."""

import functools
import json
import os
import pickle
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from formats import FEATS, LOGITS, C, D, N, fixed_list, fixed_shape, large_list, varying_list
from formulas import lse, norm

import fastood
from fastood import arrow
from fastood.arrow import Scorer, score_batch, score_file
from fastood.files import FileError

RNG = np.random.default_rng(1)
IDS = np.arange(N)
LABEL = "energy*||h||_2"


def truth(logits=LOGITS, feats=FEATS):
    """Energy times ||h||_2, in float64."""
    return lse(logits) * norm(feats, 2)


LAYOUTS = [fixed_shape, fixed_list, varying_list, large_list]


def table(layout=fixed_shape, logits=LOGITS, feats=FEATS, **more):
    return pa.table({"id": IDS[: len(logits)], "logits": layout(logits), "feats": layout(feats), **more})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_layout_has_the_scores_of_its_numbers(layout, dtype):
    logits, feats = LOGITS.astype(dtype), FEATS.astype(dtype)
    scored = score_batch(table(layout, logits, feats, name=[f"{i}.png" for i in IDS]), norm=2)
    assert scored.column_names == ["id", "name", LABEL]
    assert scored["id"].to_pylist() == [*range(N)]
    assert scored[LABEL].type == (pa.float64() if dtype == np.float64 else pa.float32())
    np.testing.assert_allclose(scored[LABEL].to_numpy(), truth(logits, feats), rtol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_and_chunks_are_rows_like_others(layout):
    whole = score_batch(table(layout), norm=2)[LABEL].to_numpy()
    part = table(layout).slice(3, 11)
    np.testing.assert_array_equal(score_batch(part, norm=2)[LABEL].to_numpy(), whole[3:14])
    columns = {
        "id": pa.array(IDS),
        "logits": pa.chunked_array([table(layout)["logits"].chunk(0).slice(a, n) for a, n in ((0, 4), (4, 19))]),
        "feats": pa.chunked_array([table(layout)["feats"].chunk(0).slice(a, n) for a, n in ((0, 9), (9, 14))]),
    }
    np.testing.assert_array_equal(score_batch(pa.table(columns), norm=2)[LABEL].to_numpy(), whole)


def test_a_record_batch_stays_one():
    (batch,) = table().to_batches()
    scored = score_batch(batch, norm=2)
    assert isinstance(scored, pa.RecordBatch)
    assert scored.schema.names == ["id", LABEL]
    np.testing.assert_array_equal(scored.column(1).to_numpy(), score_batch(table(), norm=2)[LABEL].to_numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_is_made(layout):
    column = table(layout)["logits"].chunk(0).slice(5)
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    where = values.values.buffers()[1].address if hasattr(values, "values") else None
    assert arrow._tensor("logits", column).data_ptr() == where + 5 * C * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_row_is_nan_alone(layout):
    """Null, or with NaN or a null among its numbers."""
    rows = [[*row] for row in LOGITS.tolist()]
    rows[2], rows[4][1], rows[6][0] = None, float("nan"), None
    kind = table(layout).schema.field("logits").type
    storage = pa.array(rows, kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind)
    logits = pa.ExtensionArray.from_storage(kind, storage) if isinstance(kind, pa.BaseExtensionType) else storage
    feats = FEATS.copy()
    feats[9, 0] = np.nan
    given = pa.table({"logits": logits, "feats": layout(feats), "id": IDS})
    detector = fastood.Detector(norm=2).fit(LOGITS, FEATS)
    scored = score_batch(given, detector=detector)
    bad = np.isin(IDS, [2, 4, 6, 9])
    np.testing.assert_array_equal(np.isnan(scored[LABEL].to_numpy()), bad)
    np.testing.assert_allclose(scored[LABEL].to_numpy()[~bad], truth()[~bad], rtol=2e-6)
    assert not scored["accept"].to_numpy()[bad].any()
    np.testing.assert_array_equal(np.isnan(scored["p_value"].to_numpy()), bad)
    assert scored["id"].to_pylist() == [*range(N)]


def test_a_detector_decides():
    detector = fastood.Detector(norm=2, tpr=0.5).fit(LOGITS, FEATS)
    scored = Scorer(detector=detector)(table())
    assert scored.column_names == ["id", LABEL, "accept", "p_value"]
    np.testing.assert_array_equal(scored["accept"].to_numpy(), detector.accept(LOGITS, FEATS))
    np.testing.assert_array_equal(scored["p_value"].to_numpy(), detector.p_value(LOGITS, FEATS))


def test_the_scores_that_the_columns_allow():
    every = score_batch(table(), "all", norm=None)
    assert every.column_names[1:] == list(fastood.scores(LOGITS, FEATS, norm=None))
    assert score_batch(table(), ["msp", "tv"], norm=None).column_names == ["id", "msp", "tv"]
    assert score_batch(table().drop_columns(["feats"])).column_names == ["id", "energy"]


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, D), torch.nn.ReLU(), torch.nn.Linear(D, C)
    ).eval()


IMAGES = RNG.normal(size=(N, 3, 2, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "layout", [fixed_shape, lambda x: pa.array(x.tolist(), pa.list_(pa.list_(pa.list_(pa.float32()))))]
)
def test_images_go_through_a_model(layout):
    with torch.inference_mode():
        feats = net()[:-1](torch.from_numpy(IMAGES))
        logits = net()(torch.from_numpy(IMAGES))
    scored = Scorer(model=net, norm=2)(pa.table({"id": IDS, "image": layout(IMAGES)}))
    assert scored.column_names == ["id", LABEL]
    np.testing.assert_allclose(scored[LABEL].to_numpy(), truth(logits.numpy(), feats.numpy()), rtol=1e-5)


def test_permuted_tensors_are_refused():
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(IMAGES.transpose(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"'image' must hold tensors in the order of their memory"):
        Scorer(model=net, norm=2)(pa.table({"image": images}))


def test_files_of_images_come_as_bytes_and_missing_ones_are_bad_rows():
    def reader():
        return lambda images: torch.tensor([[float(image), 0.0] for image in images])

    given = pa.table({"id": [0, 1, 2], "image": pa.array([b"4", None, b"0"], pa.binary())})
    scored = Scorer("msp", norm=None, model=reader)(given)
    np.testing.assert_allclose(scored["msp"].to_numpy(), [1 / (1 + np.exp(-4)), np.nan, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match=r"model must give \(logits, feats\), got no feats"):
        Scorer("msp", model=reader)(given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"model": net}])
def test_no_rows_have_the_columns_of_rows(layout, settings):
    rows = table(layout, image=fixed_shape(IMAGES.reshape(N, -1)))
    detector = fastood.Detector(norm=2).fit(LOGITS, FEATS)
    for scorer in (Scorer(norm=2, **settings), Scorer(detector=detector, **settings)):
        none = scorer(rows.schema.empty_table())
        assert none.num_rows == 0
        assert none.schema == scorer(rows).schema
        assert scorer(rows.slice(0, 0).combine_chunks()).schema == none.schema


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"id": IDS}, "must hold 'logits' or 'feats', found 'id'"),
        ({"feats": fixed_list(FEATS)}, "logits"),
        ({"logits": IDS}, "'logits' must be a column of tensors or of lists of numbers, got int64"),
        ({"logits": [[1.0, 2.0], [1.0]]}, "'logits' must have rows of one length, got 1 and 2"),
        ({"logits": fixed_shape(IMAGES)}, r"'logits' must hold a vector per row, got shape \[23, 3, 2, 2\]"),
        ({"logits": [[1, 2], [1, 3]]}, "logits must be float16, bfloat16, float32, float64 or FP8 .* got torch.int64"),
        ({"logits": fixed_list(LOGITS), "energy": IDS}, "no column may be called as a score is, 'energy'"),
    ],
)
def test_what_is_wrong_with_a_table(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        score_batch(pa.table(given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "enery"}, "did you mean 'energy'"),
        ({"temperature": 0}, "temperature"),
        ({"nrm": 2}, "nrm"),
        ({"logits_key": "feats"}, "logits_key and feats_key must name two columns, got 'feats' for both"),
        ({"detector": fastood.Detector(norm=2)}, "not fitted"),
        ({"detector": fastood.Detector().fit(LOGITS), "norm": 2}, "detector has settings of its own: leave out norm"),
    ],
)
def test_what_is_wrong_with_settings_is_said_when_it_is_made(settings, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        Scorer(**settings)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model must make a model"):
        Scorer(model=lambda: None)(pa.table({"image": fixed_shape(IMAGES)}))


def test_workers_get_what_was_made_here():
    scorer = Scorer(model=net, norm=2)
    given = pa.table({"image": fixed_shape(IMAGES)})
    assert pickle.loads(pickle.dumps(scorer))(given).equals(scorer(given))


# ---- files


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(table(name=[f"{i}.png" for i in IDS]), path, row_group_size=6)
    return path


@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 7, 100])
def test_a_file_becomes_one_of_scores(source, tmp_path, chunk_rows):
    out = tmp_path / "new" / "folder" / "out.parquet"
    report = score_file(source, out, Scorer(norm=2), chunk_rows=chunk_rows)
    assert report == (N, 0, None, {LABEL: int((truth() < 0).sum())}, None, [LABEL], True)
    scored = pq.read_table(out)
    assert scored.column_names == ["id", "name", LABEL]
    np.testing.assert_allclose(scored[LABEL].to_numpy(), truth(), rtol=2e-6)
    assert json.loads(scored.schema.metadata[b"method"]) == ["energy"]
    assert os.listdir(out.parent) == ["out.parquet"]


def test_uris_name_files_too(source, tmp_path):
    out = tmp_path / "out.parquet"
    assert score_file(f"file://{source}", f"file://{out}", Scorer(norm=2)).rows == N
    assert pq.read_table(out).num_rows == N


def test_what_is_not_asked_for_is_not_read(tmp_path):
    """Features of another length each, which a score of logits alone does not see."""
    feats = pa.array([[0.0] * i for i in range(N)])
    pq.write_table(pa.table({"logits": fixed_list(LOGITS), "feats": feats}), tmp_path / "in.parquet")
    report = score_file(tmp_path / "in.parquet", tmp_path / "out.parquet", Scorer("msp", norm=None))
    assert report.rows == N
    assert pq.read_schema(tmp_path / "out.parquet").names == ["msp"]


def test_what_is_there_is_not_scored_again(source, tmp_path):
    out, scorer = tmp_path / "out.parquet", Scorer(norm=2)
    first = score_file(source, out, scorer)
    before = out.stat().st_mtime_ns
    assert score_file(source, out, scorer) == first._replace(new=False)
    assert out.stat().st_mtime_ns == before
    # By other settings, of another source, or cut off, it is not there.
    assert score_file(source, out, Scorer(norm=3)).new
    assert score_file(source, out, scorer).new
    time.sleep(0.01)
    pq.write_table(table(logits=-LOGITS), source)
    assert score_file(source, out, scorer).new
    np.testing.assert_allclose(pq.read_table(out)[LABEL].to_numpy(), truth(-LOGITS), rtol=2e-6)
    largest = LOGITS.copy()
    largest[truth().argmax()] *= 2
    detectors = [fastood.Detector(norm=2, tpr=0.9).fit(logits, FEATS) for logits in (LOGITS, largest)]
    assert detectors[0].threshold == detectors[1].threshold  # and p-values differ
    for detector in detectors:
        assert score_file(source, out, Scorer(detector=detector)).new
        assert not score_file(source, out, Scorer(detector=detector)).new
    out.write_bytes(out.read_bytes()[:100])
    assert score_file(source, out, scorer).new


def test_rows_with_nan_in_files(tmp_path):
    logits = LOGITS.copy()
    logits[[3, 20]] = np.nan
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(table(logits=logits), source)
    detector = fastood.Detector(norm=2).fit(LOGITS, FEATS)
    scorer = Scorer(detector=detector)
    report = score_file(source, out, scorer, nan="drop", chunk_rows=4)
    scored = pq.read_table(out)
    assert (report.rows, report.nan) == (N, 2)
    assert scored["id"].to_pylist() == [i for i in range(N) if i not in (3, 20)]
    assert report.accepted == scored["accept"].to_numpy().sum() == detector.accept(logits, FEATS).sum() > 0
    with pytest.raises(FileError, match=r"in\.parquet: row 3, counted from 0, has a NaN score"):
        score_file(source, tmp_path / "other.parquet", scorer, nan="fail")
    assert sorted(os.listdir(tmp_path)) == ["in.parquet", "out.parquet"]


def test_a_file_without_rows(tmp_path):
    for layout in LAYOUTS:
        pq.write_table(table(layout).slice(0, 0), tmp_path / "in.parquet")
        score_file(tmp_path / "in.parquet", tmp_path / "out.parquet", Scorer(norm=2))
        none = pq.read_table(tmp_path / "out.parquet")
        assert (none.num_rows, none.column_names) == (0, ["id", LABEL])


def test_a_bad_file_is_named_and_leaves_nothing(source, tmp_path):
    out = tmp_path / "out.parquet"
    whole = source.read_bytes()
    for content, message in [
        (whole[:-100], "Parquet"),
        (b"", "Parquet"),
        (whole[:4] + bytes(200) + whole[204:], ""),
    ]:
        source.write_bytes(content)
        with pytest.raises(FileError, match=rf"in\.parquet: .*{message}"):
            score_file(source, out, Scorer(norm=2))
        assert os.listdir(tmp_path) == ["in.parquet"]
    with pytest.raises(FileError, match=r"none\.parquet: no such file"):
        score_file(tmp_path / "none.parquet", out, Scorer(norm=2))


def test_a_target_that_cannot_be_written_is_not_the_sources_fault(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        score_file(source, tmp_path / "file" / "out.parquet", Scorer(norm=2))


def test_memory_that_ran_out_is_not_the_files_fault(source, tmp_path):
    def model():
        def raising(images):
            raise MemoryError

        return raising

    with pytest.raises(MemoryError):
        score_file(source, tmp_path / "out.parquet", Scorer(model=model, inputs_key="name"))
    assert os.listdir(tmp_path) == ["in.parquet"]


def test_doubts_are_reported(tmp_path):
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    pq.write_table(table(logits=p), tmp_path / "in.parquet")
    report = score_file(tmp_path / "in.parquet", tmp_path / "out.parquet", Scorer(norm=2))
    assert "looks like probabilities" in report.odd


# ---- fits


def in_files(folder, parts, **columns):
    """The rows of these index arrays, a file each."""
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(parts):
        held = {name: fixed_list(x[rows]) if x.ndim == 2 and len(rows) else x[rows] for name, x in columns.items()}
        held = {k: x if len(rows) else pa.array([], pa.list_(pa.float32(), C)) for k, x in held.items()}
        pq.write_table(pa.table(held), folder / f"{i}.parquet", row_group_size=500)
    return sorted(folder.iterdir())


def splits(n):
    """One file, three, ten of very unequal lengths, and rows dealt out in another order; one of no rows among them."""
    order = np.random.default_rng(1).permutation(n)
    yield [np.arange(n)]
    yield np.array_split(np.arange(n), 3)
    yield np.split(order, np.sort(np.random.default_rng(2).integers(0, n, 9)))
    yield [order[: n // 2], order[:0], order[n // 2 :]]


def test_a_detector_is_the_same_however_its_rows_are_split(tmp_path):
    n = 2000
    logits = RNG.normal(size=(n, C)).astype(np.float32) * 4
    whole = fastood.Detector("energy", per_class=True).fit(logits)
    for i, parts in enumerate(splits(n)):
        paths = in_files(tmp_path / str(i), parts, logits=logits)
        fitted = [arrow.fit_file(path, fastood.Detector("energy", per_class=True), chunk_rows=300)[0] for path in paths]
        merged = functools.reduce(fastood.Detector.merge, [x for x in fitted if x.rows])
        assert merged.rows == n
        assert torch.equal(merged.threshold, whole.threshold)
        np.testing.assert_array_equal(merged.p_value(logits), whole.p_value(logits))


def test_a_sketch_is_within_its_error_however_its_rows_are_split(tmp_path, monkeypatch):
    """Files with few rows are kept as they are, files with many are sketches already when they are merged."""
    pytest.importorskip("datasketches", reason="needs datasketches: pip install 'fastood[scale]'")
    monkeypatch.setattr("fastood._sample.EXACT_ROWS", 20_000)
    n = 200_000
    logits = RNG.normal(size=(n, C)).astype(np.float32) * 4
    ranks = np.sort(fastood.score(logits).astype(float))
    for i, parts in enumerate(splits(n)):
        paths = in_files(tmp_path / str(i), parts, logits=logits)
        fitted = [arrow.fit_file(path, fastood.Detector("energy", tpr=0.9))[0] for path in paths]
        merged = functools.reduce(fastood.Detector.merge, [x for x in fitted if x.rows])
        slack = 1e-4 * n
        # The threshold is lowered by the stated error, which holds with 99% confidence: twice that is for this test.
        assert -3 * slack <= np.searchsorted(ranks, merged.threshold) - 0.1 * (n + 1) <= 2 * slack


def test_sums_are_the_same_but_for_rounding_however_rows_are_split(tmp_path):
    n = 1000
    feats = RNG.normal(size=(n, D)).astype(np.float32)
    labels = RNG.integers(0, C, n)
    whole = fastood.Fitted("mahalanobis").fit(None, feats, labels)
    for i, parts in enumerate([*splits(n)][:2]):
        paths = in_files(tmp_path / str(i), parts, feats=feats, labels=labels)
        fitted = [arrow.fit_file(path, fastood.Fitted("mahalanobis"), labels_key="labels")[0] for path in paths]
        merged = functools.reduce(fastood.Fitted.merge, fitted)
        np.testing.assert_allclose(merged.score(None, feats), whole.score(None, feats), rtol=1e-5)


def test_rows_that_cannot_be_fitted_on_fail_or_are_counted(tmp_path):
    logits = LOGITS.copy()
    logits[[2, 9]] = np.nan
    path = tmp_path / "in.parquet"
    with_null = [None if i == 4 else row for i, row in enumerate(logits)]
    pq.write_table(pa.table({"logits": pa.array(with_null, pa.list_(pa.float32()))}), path)
    with pytest.raises(FileError, match=r"in\.parquet: row 2, counted from 0, is null or not finite"):
        arrow.fit_file(path, fastood.Detector())
    fitted, lost = arrow.fit_file(path, fastood.Detector(), nan="drop", chunk_rows=5)
    assert (fitted.rows, lost) == (N - 3, 3)
    np.testing.assert_array_equal(
        fitted.p_value(LOGITS), fastood.Detector().fit(np.delete(LOGITS, [2, 4, 9], 0)).p_value(LOGITS)
    )
    pq.write_table(
        pa.table({"logits": pa.array([*LOGITS, None, None], pa.list_(pa.float32()))}), tmp_path / "b.parquet"
    )
    fitted, lost = arrow.fit_file(tmp_path / "b.parquet", fastood.Detector(), nan="drop", chunk_rows=N)
    assert (fitted.rows, lost) == (N, 2)
    with pytest.raises(ValueError, match="logits_key and feats_key must name two columns"):
        arrow.fit_file(path, fastood.Detector(), feats_key="logits")
    with pytest.raises(FileError, match="must hold 'y', found 'logits'"):
        arrow.fit_file(path, fastood.Detector(), labels_key="y")
    with pytest.raises(FileError, match="must hold 'f' or 'feats', found 'logits'"):
        arrow.fit_file(path, fastood.Detector(), logits_key="f")
