"""Writes tokenizers.json: what transformers' tokenizers give for the lines of `script_lines`.

    python tests/golden/make_tokenizers_golden.py

For each kind of `tokenizer_folders`: a digest of the folder, of the ids of 10,000 lines, end marks
included, and of the texts that they decode to without special tokens; how many tokens there are;
and the ids of `FEW`. Made with transformers 5.24, tokenizers 0.23.3 and sentencepiece 0.2.3.
"""

import hashlib
import json
import pathlib
import tempfile
from typing import Any

import script_lines
import tokenizer_folders

FILE = pathlib.Path(__file__).parent / "tokenizers.json"
FEW = (
    "The answer is <extra_id_0>, </s> or  not\n",
    "ｶﾅ ½ \U0001f600x<left> <right> a<word>b <word>",
)


def digest(found: Any) -> str:
    """Of lists of ids, or of texts."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:24]


def digest_of_folder(folder: pathlib.Path) -> str:
    """Of what training made; another version of the libraries may train other pieces."""
    return digest([[path.name, path.read_bytes().hex()] for path in sorted(folder.iterdir())])


def of_transformers(folder: pathlib.Path, texts: list[str]) -> tuple[Any, list[list[int]]]:
    """Transformers' tokenizer, and its ids of texts with an end mark each."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    end = [] if theirs("").input_ids[-1:] == [theirs.eos_token_id] else [theirs.eos_token_id]
    return theirs, [ids + end for ids in theirs(texts).input_ids]


def decoded(theirs: Any, all_ids: list[list[int]]) -> list[str]:
    """What comes before the first end mark, as transformers' tokenizer decodes it."""
    rows = [ids[: ids.index(theirs.eos_token_id)] for ids in all_ids]
    return [theirs.decode(ids, skip_special_tokens=True) for ids in rows]


def _expected(folder: pathlib.Path) -> dict[str, Any]:
    theirs, ids = of_transformers(folder, script_lines.lines())
    return {
        "folder": digest_of_folder(folder),
        "ids": digest(ids),
        "texts": digest(decoded(theirs, ids)),
        "size": len(theirs),
        "few": of_transformers(folder, list(FEW))[1],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = {kind: pathlib.Path(place) / kind for kind in tokenizer_folders.KINDS}
        found = {
            kind: _expected(tokenizer_folders.make(folder, kind)) for kind, folder in made.items()
        }
    FILE.write_text(json.dumps(found) + "\n")
