"""Serialized rows are those that TFDS writes and reads."""

import numpy as np
import polars as pl

from tpad_jax.data.sources import amazon_tables, tf_examples

LENGTHS = 0, 1, 119, 120, 127, 128, 16_370, 16_383, 16_384, 70_000  # where a head grows by a byte


def test_rows_are_the_examples_of_tfds(tmp_path):
    rng, number = np.random.default_rng(0), len(LENGTHS)
    table = pl.DataFrame({name: ['é' * (n // 2) + 'x' * (n % 2) for n in rng.permutation(LENGTHS)]
                          for name in amazon_tables.WORDS} | {
        'price': pl.Series([*rng.random(number - 1), float('nan')], dtype=pl.Float32),
        'has_image': rng.random(number) < 0.5, 'reviewed': [True] * number})
    features = amazon_tables.Amazon(data_dir=tmp_path, config='items').info.features
    records = tf_examples.serialized(table).to_pylist()
    for row, record in zip(table.iter_rows(named=True), records, strict=True):
        theirs = features.serialize_example(row)
        assert len(record) == len(theirs)
        np.testing.assert_equal(*map(features.deserialize_example_np, (record, theirs)))
    theirs = [features.serialize_example(row) for row in table.iter_rows(named=True)]
    for written in (records, theirs):
        read = tf_examples.parsed(written, table.schema | dict.fromkeys(
            amazon_tables.WORDS, pl.Binary))
        assert read.cast(table.schema).equals(table)
