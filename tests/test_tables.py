"""`dimflows.data.table`: what is read, how rows are split, the noise of integers, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfp_dimflows as dimflows

RNG = np.random.default_rng(0)
COLUMNS = {"a": RNG.normal(size=50), "b": RNG.integers(0, 5, 50), "c": 1e3 + RNG.normal(size=50)}


class Frame:
    """What a data frame is for `table`: `columns`, and a column by its name."""

    columns = list(COLUMNS)

    def __getitem__(self, name):
        return list(COLUMNS[name])


def rows_of(dataset):
    """All rows of a pass, without the condition."""
    return np.concatenate([batch["x"] if isinstance(batch, dict) else batch for batch in dataset.as_numpy_iterator()])


def write_csv(path, columns=COLUMNS):
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines))
    return path


def write_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(COLUMNS), path)
    return path


def write_npz(path):
    np.savez(path, **COLUMNS)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: COLUMNS,
        lambda folder: Frame(),
        lambda folder: write_csv(folder / "table.csv"),
        lambda folder: str(write_parquet(folder / "table.parquet")),
        lambda folder: write_npz(folder / "table.npz"),
    ],
    ids=["dict", "frame", "csv", "parquet", "npz"],
)
def test_every_source_has_the_same_rows(make, tmp_path):
    table = dimflows.data.table(make(tmp_path), batch_size=5)
    assert table.columns == ("a", "b", "c") and table.condition == ()
    assert table.train.element_spec == tf.TensorSpec([5, 3], tf.float32)
    parts = [rows_of(part) for part in (table.train, table.validation, table.test)]
    assert [len(part) for part in parts] == [40, 5, 5]
    expected = np.stack(list(COLUMNS.values()), axis=1).astype(np.float32)
    ordered = np.concatenate(parts)
    np.testing.assert_array_equal(ordered[np.argsort(ordered[:, 0])], expected[np.argsort(expected[:, 0])])
    np.testing.assert_array_equal(parts[2], expected[table.indices["test"]])
    np.testing.assert_array_equal(rows_of(dimflows.data.rows(make(tmp_path), batch_size=7)), expected)


def test_columns_of_an_array_are_numbered(tmp_path):
    np.savez(tmp_path / "simulations.npz", theta=np.ones([20, 2]), x=np.zeros(20))
    table = dimflows.data.table(tmp_path / "simulations.npz", condition=["x"], batch_size=4)
    assert table.columns == ("theta_0", "theta_1")
    batch = next(iter(table.train))
    assert batch["x"].shape == (4, 2) and batch["condition"].shape == (4, 1) and float(batch["condition"][0, 0]) == 0.0


def test_splits_and_orders_are_those_of_the_seed():
    first, again, other = (dimflows.data.table(COLUMNS, batch_size=40, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(rows_of(first.test), rows_of(again.test))
    assert not np.array_equal(rows_of(first.test), rows_of(other.test))
    np.testing.assert_array_equal(rows_of(first.validation), rows_of(first.validation))
    passes = [rows_of(first.train) for _ in range(2)]
    assert not np.array_equal(*passes)
    np.testing.assert_array_equal(*(np.sort(some, axis=0) for some in passes))


def test_repeated_rows_are_the_same_in_each_iteration():
    table = dimflows.data.table(COLUMNS, integer=["b"], batch_size=20, repeat=True)
    assert table.train.cardinality() == tf.data.INFINITE_CARDINALITY
    first, again = (list(table.train.take(4).as_numpy_iterator()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    one, two = np.concatenate(first[:2]), np.concatenate(first[2:])
    np.testing.assert_array_equal(np.sort(one[:, 0]), np.sort(two[:, 0]))
    assert not np.array_equal(one[:, 0], two[:, 0])
    np.testing.assert_array_equal(next(iter(table.train.skip(3))), first[3])


def test_integers_have_noise_that_is_fixed_but_in_training():
    table = dimflows.data.table(COLUMNS, integer=["b"], batch_size=40)
    first, again = (rows_of(table.train) for _ in range(2))
    by_a = [some[np.argsort(some[:, 0])] for some in (first, again)]
    assert (by_a[0][:, 1] != by_a[1][:, 1]).all()
    np.testing.assert_array_equal(np.floor(by_a[0][:, 1]), np.floor(by_a[1][:, 1]))
    np.testing.assert_array_equal(by_a[0][:, [0, 2]], by_a[1][:, [0, 2]])
    assert 0.3 < (first[:, 1] % 1.0).mean() < 0.7
    np.testing.assert_array_equal(rows_of(table.test), rows_of(table.test))
    assert (rows_of(table.test)[:, 1] % 1.0 > 0.0).any()
    columns = table.to_columns(first)
    assert columns["b"].dtype == np.int64 and list(columns) == ["a", "b", "c"]
    np.testing.assert_array_equal(columns["b"], np.floor(first[:, 1]))


def test_noise_keeps_integers_off_their_ends(monkeypatch):
    large = {"a": np.arange(100) + 2**19}
    for ends in (0.0, 1.0 - 2.0**-24):
        monkeypatch.setattr(tf.random, "stateless_uniform", lambda shape, seed, ends=ends: tf.fill(shape, ends))
        values = np.concatenate(list(dimflows.data.table(large, integer=["a"], batch_size=20).train.as_numpy_iterator()))
        assert set(np.floor(values[:, 0])) <= set(large["a"]) and (values % 1.0 > 0.0).all()


def test_no_rows_for_validation_and_the_digest_of_a_table():
    table = dimflows.data.table(COLUMNS, batch_size=8, validation_split=0.0)
    assert table.validation is None and len(table.indices["train"]) == 45
    assert table.digest == dimflows.data.table(COLUMNS, batch_size=4, seed=3).digest
    assert table.digest != dimflows.data.table({name: column[::-1] for name, column in COLUMNS.items()}, batch_size=4).digest


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"a": [1.0, np.nan] * 25}, {}, r"column 'a' has nan in row 1, counted from 0 \(25 such rows\), needs finite"),
        ({"a": [1.0, None] * 25}, {}, "column 'a' has None in row 1"),
        ({"a": [1e39] * 50}, {}, "column 'a' has 1e.39 in row 0"),
        ({"a": ["1.5", "red"] * 25}, {}, "column 'a' has 'red' in row 1, counted from 0, needs numbers"),
        ({"a": [1.0] * 49}, {}, "got columns of {'a': 49, 'b': 50, 'c': 50} rows"),
        ({"a": [[1.0]] * 50}, {}, r"column 'a' has the shape \[50, 1\], needs \[N\]"),
        ({}, {"columns": ["a", "d"]}, "got 'd', needs one of a, b, c"),
        ({}, {"columns": ["a"], "condition": ["a"]}, "needs one column or more, each once"),
        ({}, {"condition": ["a", "b", "c"]}, "needs one column or more"),
        ({}, {"condition": ["b"], "integer": ["b"]}, "and integers among them"),
        ({}, {"integer": ["a"]}, "column 'a' has .* in row 0, counted from 0, needs integers"),
        ({"b": [2**20] * 50}, {"integer": ["b"]}, "column 'b' has 1048576.0 in row 0"),
        ({"a": np.array(["2020-01-01"] * 50, "datetime64[ns]")}, {}, "column 'a' is of type datetime64"),
        ({"a": np.ones(50, complex)}, {}, "column 'a' is of type complex128, needs numbers"),
        ({"a": ["1_0"] * 50}, {}, "column 'a' has '1_0' in row 0"),
        ({1: np.ones(50), "1": np.ones(50)}, {}, "needs each name once"),
        ({"": np.ones(50)}, {}, "got a column without a name, such as a data frame's index"),
        ({}, {"bounds": [None]}, "needs None or a pair of numbers for each of"),
        (
            {"a": [1.0] * 49 + [0.0]},
            {"bounds": [[0, None], None, None]},
            "column 'a' has 0.0 in row 49, counted from 0, needs num",
        ),
        ({"b": [1] * 49 + [3]}, {"integer": ["b"], "bounds": [None, [1, 3], None]}, "column 'b' has 3.0 in row 49"),
        ({}, {"test_split": 0.6, "validation_split": 0.4}, "got validation_split=0.4 and test_split=0.6 of 50 rows"),
        ({}, {"test_split": 0.0}, "needs shares between 0 and 1"),
        ({}, {"batch_size": 41}, "got batch_size=41 for 40 rows of training"),
    ],
)
def test_bad_tables_are_refused(change, options, message):
    with pytest.raises(ValueError, match=f"^table: .*{message}"):
        dimflows.data.table(COLUMNS | change, **{"batch_size": 8} | options)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        dimflows.data.table(tmp_path / "nothing.csv")
    (tmp_path / "table.txt").write_text("a b")
    with pytest.raises(ValueError, match="got a file of kind '.txt', needs .csv, .parquet or .npz"):
        dimflows.data.table(tmp_path / "table.txt")
    (tmp_path / "single.csv").write_text("a\n1\n\n3\n")
    with pytest.raises(ValueError, match="column 'a' has nan in row 1"):
        dimflows.data.table(tmp_path / "single.csv")
    np.savez(tmp_path / "clash.npz", a=np.ones([20, 2]), a_0=np.ones(20))
    with pytest.raises(ValueError, match="needs each name once"):
        dimflows.data.table(tmp_path / "clash.npz")
    np.savez(tmp_path / "scalar.npz", a=np.ones(20), b=3)
    with pytest.raises(ValueError, match=r"column 'b' has the shape \[\]"):
        dimflows.data.table(tmp_path / "scalar.npz")
    assert dimflows.data.table(tmp_path / "scalar.npz", columns=["a"], batch_size=4).columns == ("a",)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="broken.npz"):
        dimflows.data.table(tmp_path / "broken.npz")
    write_csv(tmp_path / "gap.csv", {"a": [1, "", 3], "b": [1, 2, 3]})
    with pytest.raises(ValueError, match="gap.csv'?: column 'a' has nan in row 1"):
        dimflows.data.table(tmp_path / "gap.csv")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3")
    with pytest.raises(ValueError, match="ragged.csv.*Expected 2 columns, got 1"):
        dimflows.data.table(tmp_path / "ragged.csv")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match="needs each name once"):
        dimflows.data.table(tmp_path / "twice.csv")
    with pytest.raises(ValueError, match="got a int, needs a path, a data frame or a dict"):
        dimflows.data.table(3)


@pytest.mark.slow
def test_a_conditional_density_of_a_table(tmp_path):
    keras.utils.set_random_seed(0)
    generator = np.random.default_rng(1)
    a, b, c = generator.normal(size=4000), generator.normal(size=4000), generator.uniform(size=4000)
    rows = {"a": 100.0 + 10.0 * a, "b": np.exp(0.5 * a + 0.3 * b), "c": c}
    rows["a"] += 200.0 * rows["c"]
    table = dimflows.data.table(rows, condition=["c"])
    flow = dimflows.recipes.nsf([2], depth=3, bounds=[None, [0.0, None]], condition_shape=[1])
    model = dimflows.FlowModel(flow, seed=0)
    model.adapt(table.train)
    model.compile(keras.optimizers.Adam(3e-3))
    model.fit(table.train, epochs=25, validation_data=table.validation, verbose=0)
    nll = model.evaluate(table.test, return_dict=True, verbose=0)["nll"]
    # The entropy: a is normal of deviation 10 given c, log b given a is normal of deviation 0.3 around 0.5 a, of mean 0.
    entropy = np.log(10.0) + np.log(0.3) + 1.0 + np.log(2.0 * np.pi)
    assert abs(nll - entropy) < 0.25, (nll, entropy)
    condition = np.repeat([[0.0], [1.0]], 500, axis=0).astype("float32")
    samples = table.to_columns(model.sample(seed=0, condition=condition))
    assert abs(samples["a"][:500].mean() - 100.0) < 4.0 and abs(samples["a"][500:].mean() - 300.0) < 4.0
    assert samples["b"].min() > 0.0
