"""`table`: columns of numbers, from files and data frames, as batches of events and conditions."""

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfp_dimflows.data.pipeline import endlessly_shuffled
from tfp_dimflows.messages import check_name

_LARGEST_INTEGER = 2**20  # beyond it float32 has hardly room for noise


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of a table for training, validation and test, as `FlowModel.fit` takes them.

    Attributes:
      columns: names of the columns of an event, in their order.
      condition: names of the columns of its condition.
      integer: names of those columns of an event that hold integers.
      digest: of all numbers of these columns, by which a table that has changed is known.
      indices: which rows of the table, counted from 0, are in `"train"`, `"validation"` and `"test"`.
      train: batches of rows for training: float32 events `[batch_size, D]`, with a condition dicts of `"x"` and `"condition"`.
      validation: the same for validation, in a fixed order, the last batch perhaps smaller; None without rows for it.
      test: the same for the test.
    """

    columns: tuple[str, ...]
    condition: tuple[str, ...]
    integer: tuple[str, ...]
    digest: str
    indices: dict[str, np.ndarray]
    train: tf.data.Dataset
    validation: tf.data.Dataset | None
    test: tf.data.Dataset

    def to_columns(self, events: Any) -> dict[str, np.ndarray]:
        """Events, such as samples of a model, as columns of the table: a dict that a data frame can be made of.

        Args:
          events: `[N, D]`. Columns of integers are rounded down.

        Raises:
          ValueError: for events of another size.
        """
        return to_columns(events, self.columns, self.integer)


def table(
    source: str | os.PathLike | Mapping[str, Any] | Any,
    *,
    columns: Sequence[str] | None = None,
    condition: Sequence[str] = (),
    integer: Sequence[str] = (),
    bounds: Sequence[Sequence[float | None] | None] | None = None,
    batch_size: int = 128,
    validation_split: float = 0.1,
    test_split: float = 0.1,
    seed: int = 0,
    repeat: bool = False,
) -> Table:
    """Reads columns of numbers, and splits their rows by a seed into training, validation and test.

    Values stay in the table's units: flows of recipes of vectors standardise events by `FlowModel.adapt`, `nsf` conditions too.
    Noise from (0, 1) is added to columns of integers, to those for training anew in each pass. The log-density of an event, in
    the mean over the noise, is then at most the logarithm of the probability of its integers.

    Args:
      source: the path of a CSV file with a header, of a Parquet file, or of an `.npz` file of arrays `[N]` (or `[N, n]`, whose
        columns are named `name_0`, `name_1` and so on); or a data frame, or a dict of columns.
      columns: names of the columns of an event; None: all but those of the condition.
      condition: names of the columns of its condition.
      integer: names of columns of an event that hold integers.
      bounds: for each column of an event None, or the interval (low, high) in which its values are, as of the recipe `nsf`;
        either end may be None.
      batch_size: rows per batch.
      validation_split: share of the rows for validation, at least one row; 0: none.
      test_split: share of the rows for the test, at least one row.
      seed: integer seed of the splits, of the order of the rows for training, and of the noise.
      repeat: whether the batches for training are repeated without end, the same in each iteration, as
        `dimflows.training.train` needs them to resume.

    Raises:
      ValueError: if the file is of another kind, a column does not exist, has text, a missing or infinite value (the message
        says in which row), a value that is not inside its bounds, no name, or one that is there twice; if integers are none, or
        2^20 and more in size; if the shares leave no rows.
      FileNotFoundError: if there is no such file.

    #### Example

    >>> rows = {"a": np.arange(20.0), "b": np.arange(20) % 3, "c": np.ones(20)}
    >>> table = dimflows.data.table(rows, condition=["c"], integer=["b"], batch_size=8)
    >>> table.columns, {name: spec.shape for name, spec in table.train.element_spec.items()}
    (('a', 'b'), {'x': TensorShape([8, 2]), 'condition': TensorShape([8, 1])})
    >>> table.to_columns([[0.5, 2.7]])
    {'a': array([0.5]), 'b': array([2])}
    """
    content = _content(source, columns, condition, integer)
    content.check_bounds(bounds)
    title, num_rows = content.title, len(content.arrays[0])
    indices = _split(title, num_rows, validation_split, test_split, seed)
    if len(indices["train"]) < batch_size:
        raise ValueError(
            f"{title}: got batch_size={batch_size} for {len(indices['train'])} rows of training, needs a smaller one"
        )
    examples = content.examples(indices["train"])
    if repeat:
        shuffled = endlessly_shuffled(examples, seed)
        seeds = tf.data.Dataset.counter().map(lambda step: tf.stack([tf.constant(seed, tf.int64), step]))
    else:
        shuffled = examples.shuffle(len(indices["train"]), seed=seed)
        seeds = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).batch(2, drop_remainder=True)
    batches = tf.data.Dataset.zip(shuffled.batch(batch_size, drop_remainder=True), seeds).map(content.batch_with_noise)
    train = content.finished(batches)
    noisy = content.with_noise(seed)
    validation, test = (noisy.finished(noisy.examples(indices[part]).batch(batch_size)) for part in ("validation", "test"))
    validation = validation if len(indices["validation"]) else None
    return Table(content.columns, content.condition, content.integer, content.digest(), indices, train, validation, test)


def rows(
    source: str | os.PathLike | Mapping[str, Any] | Any,
    *,
    columns: Sequence[str] | None = None,
    condition: Sequence[str] = (),
    integer: Sequence[str] = (),
    batch_size: int = 128,
    seed: int = 0,
) -> tf.data.Dataset:
    """All rows of a table in their order, as batches of events and conditions, such as for `FlowModel.score`.

    Args:
      source: as in `table`.
      columns: as there.
      condition: as there.
      integer: as there.
      batch_size: rows per batch; the last one may have fewer.
      seed: integer seed of the noise of integers.

    Raises:
      ValueError: as `table`.
      FileNotFoundError: if there is no such file.

    #### Example

    >>> rows = dimflows.data.rows({"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]}, columns=["b"], batch_size=2)
    >>> [batch.tolist() for batch in rows.as_numpy_iterator()]
    [[[4.0], [5.0]], [[6.0]]]
    """
    content = _content(source, columns, condition, integer).with_noise(seed)
    return content.finished(content.examples(slice(None)).batch(batch_size))


def to_columns(events: Any, names: Sequence[str], integer: Sequence[str]) -> dict[str, np.ndarray]:
    """`Table.to_columns` of columns of these names."""
    events = np.asarray(events)
    if events.ndim != 2 or events.shape[1] != len(names):
        raise ValueError(f"Table: got events of shape {list(events.shape)}, needs [N, {len(names)}]")
    columns = dict(zip(names, events.T, strict=True))
    return columns | {name: np.floor(columns[name]).astype(np.int64) for name in integer}


@dataclasses.dataclass(frozen=True)
class _Content:
    """What was read of a table: events, and conditions if there are any."""

    title: str
    columns: tuple[str, ...]
    condition: tuple[str, ...]
    integer: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]

    def examples(self, indices: Any) -> tf.data.Dataset:
        """Some rows."""
        return tf.data.Dataset.from_tensor_slices(tuple(array[indices] for array in self.arrays))

    def digest(self) -> str:
        """That of `Table`."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in self.arrays)).hexdigest()[:16]

    def check_bounds(self, bounds: Sequence[Sequence[float | None] | None] | None) -> None:
        """Raises a ValueError for bounds of another number, and for the first value that is not inside."""
        if bounds is not None and len(bounds) != len(self.columns):
            raise ValueError(f"{self.title}: got bounds={bounds!r}, needs None or a pair of numbers for each of {self.columns}")
        for name, column, pair in zip(self.columns, self.arrays[0].T, bounds or ()):
            low, high = (None, None) if pair is None else pair
            is_integer = name in self.integer  # whose noise keeps it off the ends
            is_bad = np.zeros(len(column), bool)
            if low is not None:
                is_bad |= column < low if is_integer else column <= low
            if high is not None:
                is_bad |= column + 1 > high if is_integer else column >= high
            if is_bad.any():
                row = int(np.argmax(is_bad))
                raise ValueError(
                    f"{self.title}: column {name!r} has {column[row]} in row {row}, counted from 0, needs numbers between "
                    f"{low} and {high}{', with 1 to spare for the noise of integers' if is_integer else ''}"
                )

    def with_noise(self, seed: int) -> "_Content":
        """The rows with noise of their integers."""
        events, *condition = self.arrays
        noise = np.random.default_rng(seed).uniform(size=events.shape).astype(np.float32)
        noisy = np.clip(events + noise, np.nextafter(events, np.inf), np.nextafter(events + 1, -np.inf))
        return dataclasses.replace(self, arrays=(np.where(self._is_integer(), noisy, events), *condition))

    def batch_with_noise(self, batch: tuple[tf.Tensor, ...], seed: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """A batch of rows with noise of their integers."""
        events, *condition = batch
        if self.integer:
            least, most = tf.math.nextafter(events, np.inf), tf.math.nextafter(events + 1.0, -np.inf)
            noisy = tf.clip_by_value(events + tf.random.stateless_uniform(tf.shape(events), seed), least, most)
            events = tf.where(self._is_integer(), noisy, events)
        return (events, *condition)

    def _is_integer(self) -> np.ndarray:
        return np.array([name in self.integer for name in self.columns])

    def finished(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """Batches of rows in the form that `FlowModel` takes."""

        def finish(events: tf.Tensor, condition: tf.Tensor | None = None) -> Any:
            return events if condition is None else {"x": events, "condition": condition}

        options = tf.data.Options()
        options.autotune.enabled = False  # as in `load`
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        return batches.map(finish).prefetch(1).with_options(options)


def _content(source: Any, columns: Sequence[str] | None, condition: Sequence[str], integer: Sequence[str]) -> _Content:
    title = f"table {os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else "table"
    arrays = _read(source, title)
    condition, integer = tuple(condition), tuple(integer)
    columns = tuple(name for name in arrays if name not in condition) if columns is None else tuple(columns)
    for name in (*columns, *condition, *integer):
        check_name(title, name, arrays)
    if not columns or len({*columns, *condition}) < len(columns) + len(condition) or set(integer) - set(columns):
        raise ValueError(
            f"{title}: got columns={list(columns)}, condition={list(condition)}, integer={list(integer)}, needs one column or "
            "more, each once, and integers among them"
        )
    matrix = _matrix(title, {name: arrays[name] for name in (*columns, *condition)})
    for name in integer:
        _check_integers(title, name, arrays[name])
    parts = [matrix[:, : len(columns)], *([matrix[:, len(columns) :]] if condition else [])]
    return _Content(title, columns, condition, integer, tuple(parts))


def _read(source: Any, title: str) -> dict[str, np.ndarray]:
    """Columns by their names."""
    if not isinstance(source, (str, os.PathLike)):
        names = source.keys() if isinstance(source, Mapping) else getattr(source, "columns", None)
        if names is None:
            raise ValueError(f"{title}: got a {type(source).__name__}, needs a path, a data frame or a dict of columns")
        return _named(title, [(str(name), np.asarray(source[name])) for name in names])
    path = os.path.expanduser(os.fspath(source))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{title}: there is no such file")
    kind = os.path.splitext(path)[1].lower()
    if kind == ".npz":
        try:
            with np.load(path) as stored:
                return _named(title, [column for name in stored.files for column in _columns_of(name, stored[name])])
        except zipfile.BadZipFile as error:
            raise ValueError(f"{title}: {error}") from None
    if kind not in (".csv", ".parquet"):
        raise ValueError(f"{title}: got a file of kind {kind!r}, needs .csv, .parquet or .npz")
    import pyarrow
    from pyarrow import csv, parquet

    try:
        content = csv.read_csv(path) if kind == ".csv" else parquet.read_table(path)
        if kind == ".csv" and len(content.column_names) == 1:  # of which an empty line is a row without a value
            content = csv.read_csv(path, parse_options=csv.ParseOptions(ignore_empty_lines=False))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{title}: {error}") from None
    return _named(title, list(zip(content.column_names, (column.to_numpy() for column in content.columns), strict=True)))


def _named(title: str, columns: list[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = [name for name, _ in columns]
    if len(set(names)) < len(names):
        raise ValueError(f"{title}: got the columns {names}, needs each name once")
    if "" in names:
        raise ValueError(f"{title}: got a column without a name, such as a data frame's index; write the file without it")
    return dict(columns)


def _columns_of(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(name, array)] if array.ndim != 2 else [(f"{name}_{k}", column) for k, column in enumerate(array.T)]


def _matrix(title: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Columns side by side, as float32."""
    numbers = {}
    for name, column in columns.items():
        if column.ndim != 1:
            raise ValueError(f"{title}: column {name!r} has the shape {list(column.shape)}, needs [N]")
        with np.errstate(over="ignore"):
            numbers[name] = _as_floats(title, name, column).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(numbers[name]))
        if len(bad):
            raise ValueError(
                f"{title}: column {name!r} has {column[bad[0]]} in row {bad[0]}, counted from 0 ({len(bad)} such rows), needs "
                "finite numbers of float32 everywhere; drop these rows or fill them in"
            )
    lengths = {name: len(column) for name, column in numbers.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{title}: got columns of {lengths} rows, needs as many of each")
    return np.stack(list(numbers.values()), axis=1)


def _as_floats(title: str, name: str, column: np.ndarray) -> np.ndarray:
    if column.dtype.kind in "biuf":
        return column.astype(np.float64)
    if column.dtype.kind not in "OUS":
        raise ValueError(f"{title}: column {name!r} is of type {column.dtype}, needs numbers")
    floats = np.full(len(column), np.nan)
    for row, value in enumerate(column):
        try:
            floats[row] = np.nan if value is None else float(value.replace("_", "?") if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{title}: column {name!r} has {str(value)!r} in row {row}, counted from 0, needs numbers"
            ) from None
    return floats


def _check_integers(title: str, name: str, column: np.ndarray) -> None:
    column = _as_floats(title, name, column)
    bad = np.flatnonzero((np.floor(column) != column) | (np.abs(column) >= _LARGEST_INTEGER))
    if len(bad):
        raise ValueError(
            f"{title}: column {name!r} has {column[bad[0]]} in row {bad[0]}, counted from 0, needs integers below 2^20 in size"
        )


def _split(title: str, num_rows: int, validation_split: float, test_split: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of the rows of each part."""
    sizes = [max(1, round(share * num_rows)) if share else 0 for share in (test_split, validation_split)]
    if not (0.0 <= validation_split < 1.0 and 0.0 < test_split < 1.0) or sum(sizes) >= num_rows:
        raise ValueError(
            f"{title}: got validation_split={validation_split} and test_split={test_split} of {num_rows} rows, needs shares "
            "between 0 and 1 that leave rows for training"
        )
    test, validation, train = np.split(np.random.default_rng(seed).permutation(num_rows), np.cumsum(sizes))
    return {"train": train, "validation": validation, "test": test}
