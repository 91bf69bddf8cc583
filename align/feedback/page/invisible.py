"""Characters that show nothing, made visible, but for those that a script needs where it needs them.

Persian parts its words' members with ZWNJ, Indic scripts and families of emoji join with ZWJ, Japanese names and emoji
choose their shape with a variation selector: these are read as written. Anywhere else the same characters are a place
to hide something, and are shown by their numbers.
"""

import re
import unicodedata

PLAIN = (  # what most texts are made of and everybody sees: it is passed over without a look at each
    " -~\n\t\u00c0-\u024f\u0400-\u0481\u0620-\u064a\u0904-\u0939"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fef\uac00-\ud7a3\ufffd"
)
MAYBE_HIDDEN = re.compile(  # a run of one other character, which is no flag of England, Scotland or Wales
    "\U0001f3f4\U000e0067\U000e0062(?:\U000e0065\U000e006e\U000e0067|\U000e0073\U000e0063\U000e0074"
    f"|\U000e0077\U000e006c\U000e0073)\U000e007f|([^{PLAIN}])\\1*"
)
BLANKS = set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")  # letters and marks that show nothing
SEEN = set("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u0890\u0891\u08e2")  # Arabic signs, formats by name, that show
ZWNJ, ZWJ = "\u200c", "\u200d"
JOINING = {  # scripts whose letters take other shapes at a joiner, by the first word of their letters' names
    *("ADLAM", "ARABIC", "BALINESE", "BENGALI", "CHAKMA", "DEVANAGARI", "GRANTHA", "GUJARATI", "GURMUKHI", "JAVANESE"),
    *("KANNADA", "KHMER", "MALAYALAM", "MANDAIC", "MONGOLIAN", "MYANMAR", "NEWA", "NKO", "ORIYA", "SINHALA", "SYRIAC"),
    *("TAMIL", "TELUGU", "TIBETAN", "TIRHUTA"),
}
PICTURE = re.compile("[\u00a9\u00ae\u2190-\u21ff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
DRESSED = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")  # what may stand between an emoji and its joiner
BASES = {"So", "Sm", "Po", "Nd", "No"}  # what has variations: pictures and signs,
EMOJI_BASES = set("ℹ〰0123456789#*")  # what else becomes an emoji,
WRITTEN_BASES = ("CJK", "HIRAGANA", "KATAKANA", "MYANMAR", "PHAGS-PA")  # and letters by the first word of their names


def with_hidden_shown(html: str) -> str:
    """Control, direction, zero-width and other invisible characters as `<mark>U+202E</mark>`.

    Over finished HTML, after entities have become characters; no attribute in it can hold text of the answer's.
    """
    return MAYBE_HIDDEN.sub(_shown, html)


def _shown(run: re.Match[str]) -> str:
    character, text = run[1], run.string
    if character is None or not _is_hidden(character):
        return run[0]
    before = text[run.start() - 1] if run.start() else " "
    after = text[run.end()] if run.end() < len(text) else " "
    if len(run[0]) == 1 and _is_at_work(character, before, after):
        return run[0]
    times = f"×{len(run[0])}" if len(run[0]) > 1 else ""
    return f"<mark>U+{ord(character):04X}{times}</mark>"


def _is_hidden(character: str) -> bool:
    category = unicodedata.category(character)
    if category == "Cn" and PICTURE.match(character):  # an emoji that is younger than Python's tables
        return False
    is_format = category[0] == "C" or category in ("Zl", "Zp")
    return (is_format and character not in SEEN) or character in BLANKS or _is_selector(character)


def _is_selector(character: str) -> bool:
    """Variations of the character before, 256 of them: where that has none, a place to hide data."""
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def _is_at_work(character: str, before: str, after: str) -> bool:
    """Whether a character that shows nothing changes how its neighbours are drawn."""
    if character == ZWNJ:  # Persian endings stand behind names in Latin letters and behind digits too
        return ((before.isalnum() or _joins(before)) and _joins(after)) or _is_virama(before)
    if character == ZWJ:
        is_picture = PICTURE.match(before) or DRESSED.match(before)
        return _joins(before) or _joins(after) or bool(is_picture and PICTURE.match(after))
    return _is_selector(character) and _has_variations(before, is_plain=character <= "\ufe0f")


def _joins(character: str) -> bool:
    """Whether it is a letter or mark of a script that knows joiners."""
    return unicodedata.category(character)[0] in "LM" and _script(character) in JOINING


def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0]


def _is_virama(character: str) -> bool:
    return unicodedata.combining(character) == 9


def _has_variations(character: str, *, is_plain: bool) -> bool:
    """Whether one of the 16 plain variation selectors, or of the 240 for ideographs, may follow."""
    if not is_plain:
        return _script(character) == "CJK"
    is_sign = not character.isascii() and unicodedata.category(character) in BASES
    return is_sign or character in EMOJI_BASES or _script(character) in WRITTEN_BASES
