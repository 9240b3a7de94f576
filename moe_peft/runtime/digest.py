"""Digests of trees: what identifies a backbone and shows that a checkpoint is undamaged."""

from collections.abc import Iterable
import concurrent.futures
import hashlib
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np


def of_tree(tree: PyTree) -> str:
    """Returns the SHA-256 digest of the sorted names, shapes, dtypes and bytes of all leaves.

    It does not depend on how the tree is nested in memory or sharded. Leaves are hashed in
    parallel, about a gigabyte per second and core.

    >>> of_tree({"a": np.zeros(2)}) == of_tree({"a": np.zeros(2, np.float32)})
    False
    """
    items = jax.tree_util.tree_leaves_with_path(tree)
    called = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return of_leaves(pool.map(lambda item: of_leaf(called(item[0]), item[1]), items))


def of_leaves(digests: Iterable[str]) -> str:
    """Returns the digest of a tree from those of its leaves, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def of_leaf(name: str, leaf: Any) -> str:
    """Returns the digest of one leaf, called as in "encoder/layers_0/attention/key/kernel"."""
    values = np.ascontiguousarray(jax.device_get(leaf))
    found = hashlib.sha256(f"{values.shape} {values.dtype.name}\n".encode())
    found.update(values.reshape(-1).view(np.uint8).data)
    return f"{name} {found.hexdigest()}"
