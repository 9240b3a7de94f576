"""Writes task folders in P3's two published forms."""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from moe_peft.data.p3 import records

FORMS = ("tfrecord", "parquet")
_DTYPES = {
    "inputs": "int32",
    "targets": "int32",
    "idx": "int32",
    "is_correct": "bool",
    "weight": "float32",
    "inputs_pretokenized": "string",
    "targets_pretokenized": "string",
    "answer_choices": "string",
}


def write_task(
    folder: pathlib.Path, splits: Mapping[str, Sequence[records.Record]], form: str
) -> None:
    """Writes a task folder; a split without rows is left empty as P3 leaves it.

    Args:
      folder: of the task, new.
      splits: rows by the split's name.
      form: one of `FORMS`.
    """
    folder.mkdir(parents=True)
    for split, found in splits.items():
        rows = [_row(record) for record in found]
        if form == "parquet":
            if rows:
                _write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)
        else:
            _write_tfrecord(folder, split, rows)
    if form == "tfrecord":
        (folder / "COMPLETED").touch()


def _row(record: records.Record) -> dict[str, Any]:
    row = {
        "inputs": [int(i) for i in record.input_ids],
        "inputs_pretokenized": record.inputs,
        "targets": [*(int(i) for i in record.target_ids), 1],
        "targets_pretokenized": record.targets,
    }
    if record.idx is not None:
        row |= {"idx": list(record.idx), "is_correct": record.is_correct, "weight": 1.0}
    elif record.answer_choices:
        row["answer_choices"] = list(record.answer_choices)
    return row


def _write_parquet(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {"int32": pyarrow.int32(), "bool": pyarrow.bool_(), "string": pyarrow.string()}
    kinds["float32"] = pyarrow.float32()
    columns = {}
    for name, first in rows[0].items():
        kind = kinds[_DTYPES[name]]
        kind = pyarrow.list_(kind) if isinstance(first, list) else kind
        columns[name] = pyarrow.array([row[name] for row in rows], kind)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _write_tfrecord(folder: pathlib.Path, split: str, rows: Sequence[dict[str, Any]]) -> None:
    import tensorflow as tf

    features = {
        name: {"shape": [None] if isinstance(value, list) else [], "dtype": _DTYPES[name]}
        for name, value in (rows[0].items() if rows else ())
    }
    if "idx" in features:
        features["idx"]["shape"] = [2]
    info = {"features": features, "num_shards": 1, "seqio_version": "0.0.6"} if rows else {}
    stats: dict[str, int] = {"examples": len(rows)}
    for name in ("inputs", "targets") if rows else ():
        lengths = [len(row[name]) for row in rows]
        stats |= {f"{name}_tokens": sum(lengths), f"{name}_max_tokens": max(lengths)}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    (folder / f"stats.{split}.json").write_text(json.dumps(stats))
    with tf.io.TFRecordWriter(str(folder / f"{split}.tfrecord-00000-of-00001")) as writer:
        for row in rows:
            feature = {name: _feature(value) for name, value in row.items()}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString(deterministic=True))


def _feature(value: Any) -> Any:
    import tensorflow as tf

    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], str):
        encoded = [text.encode("utf-8") for text in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))
    if values and isinstance(values[0], float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[int(v) for v in values]))
