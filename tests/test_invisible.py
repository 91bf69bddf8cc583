"""Characters that show nothing: shown by number where they hide, left alone where a script needs them."""

import pytest

pytest.importorskip("nh3", reason="the labelling page's extra is not installed")

from align.feedback.page.invisible import with_hidden_shown
from align.feedback.page.rendering import rendered

READ_AS_WRITTEN = {
    "Persian": "می‌خواهم کتاب‌ها را بخوانم؛ آن‌ها PDF‌ها و ۲۰‌ساله‌اند",
    "Arabic": "قال اللهُ تعالى ﴿١﴾ \u06dd١٢ \u0600١٢",
    "Arabic, an initial form alone": "ه\u200d.",
    "Hindi": "क्\u200dष क्\u200cष हिन्दी में",
    "Bengali": "র\u200d্যাব",
    "Malayalam, a letter at the end of its word": "അവന്\u200d വന്നു",
    "Sinhala": "ශ්\u200dරී",
    "a family": "👨\u200d👩\u200d👧\u200d👦",
    "a heart on fire": "❤\ufe0f\u200d🔥",
    "a person with skin and a job": "👩🏽\u200d🚒 🧑🏿\u200d⚕\ufe0f",
    "flags": "🏳\ufe0f\u200d🌈 🇯🇵 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "keycaps and signs": "1\ufe0f⃣ #\ufe0f⃣ ℹ\ufe0f ©\ufe0f ☺\ufe0e ↔\ufe0f ≨\ufe00",
    "Japanese": "葛\U000e0100城市、東京で「日本語」を読む。",
    "an emoji younger than Python": "\U0001fadc\U0001faef",
    "Thai, Hebrew, Vietnamese": "ภาษาไทย עִבְרִית tiếng Việt",
}
HIDING = {
    "between Latin letters": ("a\u200db pass\u200cword", ["200D", "200C"]),
    "at the end of a Persian word": ("کتاب\u200c.", ["200C"]),
    "alone": ("\u200d", ["200D"]),
    "two in a row in Persian": ("می\u200c\u200cخواهم", ["200C×2"]),
    "both, where one would do": ("می\u200c\u200dخ", ["200C"]),
    "an emoji and a letter": ("👨\u200da", ["200D"]),
    "variations of letters": ("a\ufe01b\U000e0101 ب\ufe03", ["FE01", "E0101", "FE03"]),
    "variations of a variation": ("☺\ufe0f\ufe01\ufe02 葛\U000e0100\U000e0101", ["FE01", "FE02", "E0101"]),
    "tags behind a flag that is none": ("🏴\U000e0068\U000e0069\U000e007f", ["E0068", "E0069", "E007F"]),
    "tags behind a flag": ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f\U000e0041", ["E0041"]),
    "directions": ("\u202eabc\u202c \u2066x\u2069 \u200f", ["202E", "202C", "2066", "2069", "200F"]),
    "soft, blank and unassigned": ("a\u00adb\u3164 \U000e0fff", ["00AD", "3164", "E0FFF"]),
}


@pytest.mark.parametrize("text", READ_AS_WRITTEN.values(), ids=READ_AS_WRITTEN)
def test_scripts_and_emoji_are_read_as_written(text):
    assert with_hidden_shown(text) == text
    assert rendered(text)["raw"] == text and "<mark>" not in rendered(text)["html"]


@pytest.mark.parametrize(("text", "numbers"), HIDING.values(), ids=HIDING)
def test_what_joins_nothing_is_shown(text, numbers):
    for view in (with_hidden_shown(text), *rendered(text).values()):
        for number in numbers:
            assert f"<mark>U+{number}</mark>" in view
