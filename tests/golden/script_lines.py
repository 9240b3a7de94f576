"""Lines of made-up text in 20 scripts, with everything that tokenizers stumble over.

The same lines for the same numbers, everywhere: from ranges of Unicode and words written here.
"""

import random

SCRIPTS = {
    "latin": ("az", "AZ"),
    "latin_extended": ("\u00c0\u00d6", "\u00d8\u00f6", "\u0100\u017f", "az"),
    "greek": ("\u0391\u03a1", "\u03a3\u03a9", "\u03ac\u03ce"),
    "cyrillic": ("\u0410\u044f", "\u0450\u045f"),
    "armenian": ("\u0531\u0556", "\u0561\u0586"),
    "hebrew": ("\u05d0\u05ea",),
    "arabic": ("\u0621\u063a", "\u0641\u0652"),
    "devanagari": ("\u0904\u0939", "\u093e\u094d"),
    "bengali": ("\u0985\u098c", "\u0995\u09a8", "\u09be\u09c4"),
    "tamil": ("\u0b85\u0b8a", "\u0b92\u0b95", "\u0bae\u0bb9", "\u0bbe\u0bc2"),
    "thai": ("\u0e01\u0e3a", "\u0e40\u0e4e"),
    "tibetan": ("\u0f40\u0f47", "\u0f49\u0f6c", "\u0f71\u0f7c"),
    "georgian": ("\u10a0\u10c5", "\u10d0\u10f0"),
    "ethiopic": ("\u1200\u1248", "\u1260\u1288"),
    "khmer": ("\u1780\u17b3", "\u17b6\u17d3"),
    "cherokee": ("\u13a0\u13f4",),
    "hiragana": ("\u3041\u3096",),
    "katakana": ("\u30a1\u30fa", "\uff66\uff9d"),
    "han": ("\u4e00\u4eff", "\u6c34\u6c6f", "\U00020000\U0002000f"),
    "hangul": ("\uac00\uac7f", "\u1100\u1112"),
}
_TEXT = (
    "the a of to and is in that was for it with as on be at by this had not are but from or have "
    "which one were all their there been if more when will would who so no out up into than them "
    "answer question river stone quickly running unbelievable tokenizer sentence premise "
    "hypothesis entailment Where Why Paris London 1999 3.14 1,000 don't it's e-mail C++ "
    "def return self.x() foo_bar CamelCase == != -> {} [] () <div> </div> &amp; http://a.b/c?d=e"
)
WORDS = _TEXT.split()
# What splits, joins, vanishes or is read as another character.
ODD = (
    *("  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u2009", "\u2028", "\u0085"),
    *("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u200e", "\x00", "\x1c", "\x7f"),
    *("\ufb01", "\u2460", "\u00bd", "\u2122", "\uff21\uff22", "\u212b", "\u0041\u030a", "\u1e9e"),
    *("\u0132", "\u2075", "\u33a5", "\uff76\uff9e", "\ufdfa", "e\u0301\u0323", "\u2026", "\u2014"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\u2764"),
    *("\U0001f1eb\U0001f1ee", "\u2764\ufe0f", "\ue000", "\U0010fffd", "\ufffd", "\u2581", "\u0120"),
    *(" \u2581 ", "\u2581\u2581", "\u4dff", "\U0001f9ff", "\u0378", "<0x0A>", "<0xE2>", "\\n"),
)
SPECIAL = (
    *("</s>", "<pad>", "<unk>", "<s>", "<mask>", "<extra_id_0>", "<extra_id_1>", "<extra_id_99>"),
    *("<extra_id_100>", "<extra_id_", "<left>", "<right>", "<word>", "<NORMAL>", "<normal>"),
    *("<\uff2eORMAL>", "<plain>", "</S>", "< /s>", "</s></s>", "<pad><extra_id_0>"),
)


def _word(draw: random.Random, script: str) -> str:
    ranges = SCRIPTS[script]
    letters = []
    for _ in range(1 + int(draw.random() ** 2 * 9)):
        first, last = ranges[int(draw.random() * len(ranges))]
        letters.append(chr(ord(first) + int(draw.random() * (ord(last) - ord(first) + 1))))
    return "".join(letters)


def lines(count: int = 10_000, seed: int = 0, plain: bool = False) -> list[str]:
    """Returns `count` lines, every script in turn; `plain`: words only, to train on."""
    draw = random.Random(seed)  # of which only random() is used, the same in every Python
    pick = lambda given: given[int(draw.random() * len(given))]
    scripts, found = list(SCRIPTS), []
    # Words come again, as in a language, and are those of every seed.
    words = random.Random("words")
    known = {script: [_word(words, script) for _ in range(150)] for script in scripts}
    for number in range(count):
        script, parts = scripts[number % len(scripts)], []
        for _ in range(1 + int(draw.random() * 14)):
            share = draw.random()
            if plain or share < 0.72:
                text = pick(WORDS) if share < 0.3 else pick(known[script])
            elif share < 0.8:
                text = _word(draw, pick(scripts))
            elif share < 0.92:
                text = pick(ODD)
            else:
                text = pick(SPECIAL)
            parts += [text, " " if plain or draw.random() < 0.7 else ""]
        if plain or draw.random() < 0.5:
            parts = parts[:-1]
        if not plain and draw.random() < 0.15:
            parts.insert(0, pick((" ", "  ", "\n", "\t ")))
        found.append("".join(parts))
    if not plain:
        found[: len(ODD) + len(SPECIAL)] = (*ODD, *SPECIAL)
        found[len(ODD) + len(SPECIAL)] = ""
        found[len(ODD) + len(SPECIAL) + 1] = " "
    return found
