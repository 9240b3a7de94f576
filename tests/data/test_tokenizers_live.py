"""Tokenizers of folders and transformers' own, on 10,000 lines in 20 scripts."""

from make_tokenizers_golden import decoded, of_transformers
import pytest
import script_lines
import tokenizer_folders

from moe_peft.data import tokenizers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LINES = script_lines.lines(seed=2)  # others than those whose ids are stored


@pytest.fixture
def transformers():
    """The library, of a version that has fast tokenizers only."""
    found = pytest.importorskip("transformers")
    if int(found.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 reads U+0085 and what ByT5 decodes in another way")
    return found


def check(folder, lines=LINES):
    """Ids, texts and special ids of a folder are the same."""
    ours = tokenizers.of_folder(folder)
    theirs, expected = of_transformers(folder, lines)
    found = [ids + [ours.eos_id] for ids in ours.encode_all(lines)]
    assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b] == []
    texts = [ours.decode(ids) for ids in found]
    assert texts == decoded(theirs, expected)
    assert ours.vocab_size == len(theirs)
    for role in ("pad", "eos", "unk", "bos"):
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id"), role
    return theirs


@pytest.mark.parametrize("kind", tokenizer_folders.KINDS)
def test_ids_texts_and_special_ids(kind, tmp_path, transformers):
    theirs = check(tokenizer_folders.make(tmp_path / kind, kind))
    # What transformers writes of it, with one token more of each flag.
    flags = ({}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": False})
    names = ("<word>", "<left>", "<right>", "<plain>", "<normal>")
    added = map(lambda name, flag: transformers.AddedToken(name, **flag), names, flags)
    theirs.add_tokens(list(added))
    theirs.add_special_tokens({"mask_token": "<mask>"})
    theirs.save_pretrained(str(tmp_path / "saved"))
    check(tmp_path / "saved", LINES[:3_000])


def test_a_user_s_own_tokenizer(tmp_path, transformers):
    """Of parts that no T5 has: tokenizer.json is read as it is written."""
    import tokenizers as library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = library.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = list(tokenizer_folders.OF_T5.values())
    trainer = trainers.WordPieceTrainer(
        vocab_size=2_000, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(script_lines.lines(1_500, seed=1, plain=True), trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **tokenizer_folders.OF_T5)
    theirs.save_pretrained(str(tmp_path))
    check(tmp_path)
