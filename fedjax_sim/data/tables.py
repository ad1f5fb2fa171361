"""Tables: rows of numbers, and a class or a number to tell from each; embedded, or from files."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedjax_sim.core.errors import UserError
from fedjax_sim.core.fields import nearest
from fedjax_sim.core.paths import local
from fedjax_sim.core.task import Example, Task
from fedjax_sim.data.dataset import count_classes, warn_of_empty_classes
from fedjax_sim.data.samples import Samples
from fedjax_sim.tasks import classification_of_tables, regression
from fedjax_sim.tasks.vectors import moments

TEST_SHARE = 0.25
_SPLIT_SEED = 20260729
_MOST_WORDS = 100
"""Different words that a column of text may have; each becomes a feature."""


@dataclasses.dataclass(frozen=True, eq=False)
class TableDataset(Samples):
    """A train and a test table, checked once, here.

    Attributes:
      name: for records.
      train_x, test_x: f32[n, d] (any number type is accepted), finite.
      train_y, test_y: with `num_classes` the classes i32[n] in 0..num_classes-1; else the numbers to tell,
        f32[n], finite.
      num_classes: at least 2; 0 for regression.
      train_users, test_users: i32[n] ids of whom a row comes from, by which a `natural` partition goes; or
        None.
      feature_names: one for each of the d features; `("x0", "x1", …)` where the source has none.
      class_names: one for each class; `("0", "1", …)` where the source has none.
      origin: where the rows come from, in words.
      licence: what is known of the terms, in words.

    Features, and the numbers to tell, are standardised by the training set's mean and deviation in the
    compiled step (`fedjax_sim.tasks.vectors`).

    Raises:
      UserError: naming the field (`data.train_x`), for anything that does not fit together.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int = 0
    train_users: np.ndarray | None = None
    test_users: np.ndarray | None = None
    feature_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    origin: str = "not stated"
    licence: str = "not stated"

    def __post_init__(self):
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, (int, np.integer)):
            raise UserError(
                "data.num_classes", self.num_classes, "not a whole number", "Give 0, or 2 or more."
            )
        if self.num_classes < 0 or self.num_classes == 1:
            why = "one class is nothing to tell apart"
            raise UserError("data.num_classes", self.num_classes, why, "Give 0 for regression, or 2 or more.")
        for part in ("train", "test"):
            self._check_features(f"{part}_x")
            self._check_answers(f"{part}_y", len(getattr(self, f"{part}_x")))
            self._check_users(f"{part}_users", len(getattr(self, f"{part}_x")))
        width = self.train_x.shape[1]
        if self.test_x.shape[1] != width:
            why = f"the training rows have {width} features"
            raise UserError("data.test_x", self.test_x.shape, why, "Give both the same columns.")
        if (self.train_users is None) != (self.test_users is None):
            raise UserError(
                "data.train_users", None, "only one of train and test has them", "Give both or none."
            )
        for field, wanted, least in (
            ("feature_names", width, "x{}"),
            ("class_names", self.num_classes, "{}"),
        ):
            names = tuple(map(str, getattr(self, field))) or tuple(least.format(i) for i in range(wanted))
            if len(names) != wanted:
                why = f"{len(names)} names for {wanted}"
                raise UserError(f"data.{field}", names[:10], why, "Give one name for each, or none.")
            object.__setattr__(self, field, names)
        if self.num_classes:
            warn_of_empty_classes(self.name, self.train_y, self.num_classes)

    def _check_features(self, field: str) -> None:
        try:
            values = np.ascontiguousarray(getattr(self, field), np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"data.{field}", "…", f"not numbers: {error}", "Give f32[n, d].") from None
        if values.ndim != 2 or not values.size:
            why = "not of the shape (rows, features), with one of each or more"
            raise UserError(f"data.{field}", values.shape, why, "Give f32[n, d].")
        self._check_finite(field, values)
        object.__setattr__(self, field, values)

    def _check_answers(self, field: str, rows: int) -> None:
        values = np.asarray(getattr(self, field))
        if values.shape != (rows,):
            why = f"{rows} rows need the shape ({rows},)"
            raise UserError(f"data.{field}", values.shape, why, "Give one answer for each row.")
        if not self.num_classes:
            try:
                values = np.ascontiguousarray(values, np.float32)
            except (TypeError, ValueError) as error:
                raise UserError(f"data.{field}", "…", f"not numbers: {error}", "Give f32[n].") from None
            self._check_finite(field, values)
        elif count_classes(values) > self.num_classes:
            why = f"a class beyond the {self.num_classes} that there are"
            raise UserError(f"data.{field}", int(values.max()), why, "Number the classes from 0.")
        else:
            values = np.ascontiguousarray(values, np.int32)
        object.__setattr__(self, field, values)

    def _check_finite(self, field: str, values: np.ndarray) -> None:
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            place = ", ".join(map(str, bad[0]))
            why = f"at [{place}] ({len(bad)} such numbers)"
            fix = "Fill the gaps or leave these rows out."
            raise UserError(f"data.{field}", float(values[tuple(bad[0])]), why, fix)

    def _check_users(self, field: str, rows: int) -> None:
        ids = getattr(self, field)
        if ids is None:
            return
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" or ids.shape != (rows,) or (ids.size and ids.min() < 0):
            why = f"not {rows} whole numbers from 0 up"
            fix = "Number the users, as numpy.unique(users, return_inverse=True) does."
            raise UserError(f"data.{field}", ids[:3].tolist(), why, fix)
        object.__setattr__(self, field, np.ascontiguousarray(ids, np.int32))

    def __repr__(self):
        answer = f"{self.num_classes} classes" if self.num_classes else "a number to tell"
        users = f", {len(np.unique(self.train_users))} users" if self.train_users is not None else ""
        return (
            f"TableDataset({self.name}: {len(self.train_y):,} train, {len(self.test_y):,} test, "
            f"{self.train_x.shape[1]} features, {answer}{users})"
        )

    @functools.cached_property
    def task(self) -> Task:
        """Classification or regression of these rows."""
        mean, scale = moments(self.train_x)
        if self.num_classes:
            return classification_of_tables(mean.tolist(), scale.tolist(), self.num_classes)
        centre, width = moments(self.train_y)
        return regression(mean.tolist(), scale.tolist(), (float(centre), float(width)))

    @property
    def _answer(self) -> str:
        return "label" if self.num_classes else "target"

    @property
    def train(self) -> Example:
        """The training rows: `x` f32[n, d], and `label` i32[n] or `target` f32[n]."""
        return {"x": self.train_x, self._answer: self.train_y}

    @property
    def test(self) -> Example:
        """The test rows, likewise."""
        return {"x": self.test_x, self._answer: self.test_y}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All rows, by the names under which records know them."""
        return {name: getattr(self, name) for name in ("train_x", "train_y", "test_x", "test_y")}

    def training_on(self, index: np.ndarray) -> "TableDataset":
        """The set with the training rows i64[n'] alone, and without users.

        The task stays: rows are standardised as they are in the whole set, so that a model can go on there.
        """
        users = dict.fromkeys(("train_users", "test_users"))
        made = dataclasses.replace(self, train_x=self.train_x[index], train_y=self.train_y[index], **users)
        vars(made)["task"] = self.task  # where the cached property keeps it
        return made

    @property
    def train_writers(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`train_users`, as partitions call them."""
        return self.train_users

    @property
    def test_writers(self) -> np.ndarray | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`test_users`, likewise."""
        return self.test_users


# --- embedded -----------------------------------------------------------------------------------------


def diabetes() -> TableDataset:
    """Progression of diabetes a year on, from ten measurements: 442 patients, regression.

    Efron, Hastie, Johnstone and Tibshirani, "Least Angle Regression", Annals of Statistics 2004; as
    scikit-learn ships it, unscaled. The test quarter is drawn once, by a fixed seed.
    """
    return _embedded(
        "diabetes", "load_diabetes", 0, "Efron et al. 2004, by way of scikit-learn", scaled=False
    )


def breast_cancer() -> TableDataset:
    """Malignant or benign, from 30 measurements of cell nuclei: 569 patients, two classes.

    Street, Wolberg and Mangasarian 1993 (Wisconsin, diagnostic); as scikit-learn ships it.
    """
    return _embedded("breast-cancer", "load_breast_cancer", 2, "Street et al. 1993, by way of scikit-learn")


def wine() -> TableDataset:
    """Three cultivars of wine, from 13 chemical measurements: 178 wines, three classes.

    Aeberhard and Forina 1991; as scikit-learn ships it.
    """
    return _embedded("wine", "load_wine", 3, "Aeberhard and Forina 1991, by way of scikit-learn")


def _embedded(name: str, loader: str, classes: int, origin: str, **options: Any) -> TableDataset:
    try:
        from sklearn import datasets
    except ImportError as e:
        raise UserError("data.source", name, "scikit-learn is missing", "pip install scikit-learn") from e
    raw: Any = getattr(datasets, loader)(**options)
    test = _test_rows(raw.target if classes else np.zeros(len(raw.target), np.int32), TEST_SHARE)
    return TableDataset(
        name=name,
        train_x=raw.data[~test],
        train_y=raw.target[~test],
        test_x=raw.data[test],
        test_y=raw.target[test],
        num_classes=classes,
        feature_names=tuple(raw.feature_names),
        class_names=tuple(raw.target_names) if classes else (),
        origin=origin,
        licence="as scikit-learn ships it (BSD); see its description of the set",
    )


EMBEDDED: dict[str, Callable[[], TableDataset]] = {
    "diabetes": diabetes,
    "breast-cancer": breast_cancer,
    "wine": wine,
}


def _test_rows(groups: np.ndarray, share: float) -> np.ndarray:
    """bool[n]: which rows are for testing; of every group its share, at least one, drawn by a fixed seed."""
    rng = np.random.default_rng(_SPLIT_SEED)
    test = np.zeros(len(groups), bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        test[members[: max(1, round(share * len(members)))]] = True
    return test


# --- from files ---------------------------------------------------------------------------------------


def read_table(
    path: str | Path,
    *,
    target: str | None = None,
    user: str | None = None,
    task: str | None = None,
    test: str | None = None,
) -> TableDataset:
    """Reads a CSV or Parquet file with a header.

    Columns of text become a feature for each of their words (one-hot), booleans 0 and 1.

    Args:
      path: ends in .csv or .parquet.
      target: the column to tell.
      user: the column that says whom a row comes from; it is no feature. None: there is none.
      task: `classification` or `regression`; None: classification if the target is text or booleans, else
        regression.
      test: the share of rows for testing, of every user or class its share, drawn once by a fixed seed; or a
        column that says `train` or `test` of each row. None: a quarter.

    Raises:
      UserError: no such file or column, gaps, or a column that cannot be a feature.
    """
    file = local(path, "data.source")
    table = _read(file)
    known = table.column_names
    if target is None:
        fix = f"Name the column to tell: table:{path}#target={known[-1] if known else 'NAME'}."
        raise UserError("data.source", f"table:{path}", "it does not say what to tell", fix)
    for name in (target, user):
        if name is not None and name not in known:
            raise UserError("data.source", name, f"{file} has no such column", nearest(name, known))
    if target == user:
        raise UserError("data.source", target, "the same column is target and user", "Name two columns.")
    if task not in (None, "classification", "regression"):
        raise UserError("data.source", f"task={task}", "no such task", "Write classification or regression.")
    column = table[target].combine_chunks()
    _check_whole(file, target, column)
    words = _is_text(column.type) or pa.types.is_boolean(column.type)
    task = task or ("classification" if words else "regression")
    if task == "regression" and words:
        why = f"{target} is not a number, and regression predicts numbers"
        raise UserError("data.source", f"task={task}", why, "Leave task out, or name another target.")
    answers, class_names = np.asarray(column.to_numpy(zero_copy_only=False)), ()
    if task == "classification":
        found, answers = np.unique(answers.astype(str) if words else answers, return_inverse=True)
        class_names = tuple(map(str, found))
    users = None
    if user is not None:
        _check_whole(file, user, table[user])
        values = np.asarray(table[user].combine_chunks().to_numpy(zero_copy_only=False))
        users = np.unique(values.astype(str), return_inverse=True)[1]
    groups = users if users is not None else answers if class_names else np.zeros(len(answers), np.int64)
    is_test, split = _split(file, table, test, groups)
    left = [name for name in known if name not in (target, user, split)]
    if not left:
        raise UserError("data.source", str(file), "no column is left as a feature", "Give one or more.")
    parts = [_features(file, name, table[name].combine_chunks()) for name in left]
    x = np.concatenate([values for values, _ in parts], 1)
    return TableDataset(
        name=file.stem,
        train_x=x[~is_test],
        train_y=answers[~is_test],
        test_x=x[is_test],
        test_y=answers[is_test],
        num_classes=len(class_names),
        train_users=None if users is None else users[~is_test],
        test_users=None if users is None else users[is_test],
        feature_names=tuple(name for _, names in parts for name in names),
        class_names=class_names,
        origin=str(path),
    )


def _read(file: Path) -> pa.Table:
    if file.suffix not in (".csv", ".parquet"):
        why = "neither .csv nor .parquet"
        raise UserError("data.source", str(file), why, "Save the table as one of the two.")
    if not file.is_file():
        raise UserError("data.source", str(file), "there is no such file", "Check the path.")
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(file)
        from pyarrow import csv

        return csv.read_csv(file)
    except (pa.ArrowException, OSError) as error:
        why = f"it cannot be read: {' '.join(str(error).split())[:200]}"
        raise UserError("data.source", str(file), why, "Check the file.") from None


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)


def _check_whole(file: Path, name: str, column: Any) -> None:
    if column.null_count:
        first = next(row for row, value in enumerate(column) if not value.is_valid)
        why = f"{column.null_count} of its rows in {file} are empty, the first is number {first + 1}"
        raise UserError("data.source", name, why, "Fill the gaps, or leave these rows out.")


def _features(file: Path, name: str, column: Any) -> tuple[np.ndarray, list[str]]:
    """A column as features. -> (f32[n, k], their names)."""
    _check_whole(file, name, column)
    kind = column.type
    if _is_text(kind):
        values = np.asarray(column.to_pylist(), str)
        words, index = np.unique(values, return_inverse=True)
        if len(words) > _MOST_WORDS:
            why = f"a column of text with {len(words)} different values in {file}"
            fix = "Leave it out of the file, or name it as the user."
            raise UserError("data.source", name, why, fix)
        return np.eye(len(words), dtype=np.float32)[index], [f"{name}={word}" for word in words]
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = np.asarray(column.to_numpy(zero_copy_only=False))
        return values.astype(np.float32)[:, None], [name]
    why = f"a column of type {kind} in {file} is neither numbers nor text"
    raise UserError("data.source", name, why, "Leave it out of the file, or make numbers of it.")


def _split(file: Path, table: Any, test: str | None, groups: np.ndarray) -> tuple[np.ndarray, str | None]:
    """(bool[n], which rows are for testing; the column that says so, if one does)."""
    if test is None:
        return _test_rows(groups, TEST_SHARE), None
    try:
        share = float(test)
    except ValueError:
        share = None
    if share is None:
        if test not in table.column_names:
            fix = nearest(test, table.column_names)
            raise UserError("data.source", f"test={test}", f"neither a share nor a column of {file}", fix)
        said = np.asarray(table[test].to_pylist(), str)
        if set(said) != {"train", "test"}:
            why = f"its values are {', '.join(sorted(set(said))[:5])}"
            raise UserError("data.source", f"test={test}", why, "They must be train and test, both of them.")
        return said == "test", test
    if not 0 < share < 1:
        raise UserError("data.source", f"test={test}", "not between 0 and 1", "Write test=0.25, say.")
    return _test_rows(groups, share), None
