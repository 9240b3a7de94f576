"""Names of parameters in transformers and in our unscanned tree (T5X's), both ways."""

from collections.abc import Mapping
import re

from moe_peft.models import family

_NUMBER = r"(?<=[._])\d+(?=[./])"


def path_of(name: str) -> str | None:
    """Returns the path in our unscanned tree of a weight named as in transformers, or None.

    >>> path_of("decoder.block.3.layer.1.EncDecAttention.q.weight")
    'decoder/layers_3/encoder_decoder_attention/query/kernel'
    """
    return _translated(name, [each.hugging_face for each in family.FAMILIES.values()])


def name_of(path: str) -> str | None:
    """Returns what transformers calls the parameter at a path of our unscanned tree, or None.

    >>> name_of("encoder/layers_0/pre_mlp_layer_norm/scale")
    'encoder.block.0.layer.1.layer_norm.weight'
    """
    tables = (each.hugging_face.items() for each in family.FAMILIES.values())
    return _translated(path, [{ours: theirs for theirs, ours in table} for table in tables])


def is_transposed(path: str) -> bool:
    """Whether torch stores the parameter the other way round: all linear maps and the biases."""
    return path.endswith(("/kernel", "/rel_embedding"))


def _translated(name: str, tables: list[Mapping[str, str]]) -> str | None:
    """Returns what a name is in a table, where the number of its block is "{}"."""
    block = re.search(_NUMBER, name)
    for table in tables:
        if name in table:  # of the whole network, or the bias, which is that of block 0 only
            return table[name]
        found = block and table.get(re.sub(_NUMBER, "{}", name, count=1))
        if found:
            return found.format(block[0])
    return None
