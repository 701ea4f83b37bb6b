"""Items of many shapes for the byte tokenizer: long, short, beginnings of one another, in any script."""

import random
import string

_SCRIPTS = ("äöüßéñøçâ", "мельница", "水车磨坊粉", "طاحونة", "🌾🏭🚰👟🎧", "ทดสอบ")
_WORDS = ("red", "blue", "wool", "rain", "run", "sun", "shoes", "hat", "for", "kids", "new", "sale", "mill")
SHAPES = ("words", "short", "long", "beginnings", "unicode", "numbers")


def random_texts(dice: random.Random, shape: str, count: int) -> tuple[str, ...]:
    """`count` distinct texts of at most 48 bytes, fewer where the shape has not so many."""
    make = {
        "words": _words, "short": _short, "long": _long, "beginnings": _beginning,
        "unicode": _unicode, "numbers": _number,
    }[shape]  # fmt: skip
    texts: dict[str, None] = {}
    for _ in range(4 * count):
        if len(texts) == count:
            break
        texts[make(dice)] = None
    return tuple(texts)


def _words(dice: random.Random) -> str:
    return " ".join(dice.choices(_WORDS, k=dice.randint(1, 6)))


def _short(dice: random.Random) -> str:
    return "".join(dice.choices(string.ascii_letters + string.digits, k=dice.randint(1, 3)))


def _long(dice: random.Random) -> str:
    begin = dice.choice(("the very same beginning of ", "another one: ", ""))
    return begin + "".join(dice.choices("ab ", k=dice.randint(15, 47 - len(begin)))) + "."


def _beginning(dice: random.Random) -> str:
    """Of one of a few endless texts, now and then with an end of its own."""
    text = dice.choice(("ab" * 30, "a" * 60, "mill " * 12, string.ascii_lowercase * 2))
    own = "".join(dice.choices("xyz", k=dice.choice((0, 0, 1, 4))))
    return (text[: dice.randint(1, 40)] + own).strip()


def _unicode(dice: random.Random) -> str:
    script = dice.choice(_SCRIPTS)
    return "".join(dice.choices(script + "-x", k=dice.randint(1, 8)))


def _number(dice: random.Random) -> str:
    return f"{dice.choice(('sku', 'item', 'nr'))}-{dice.randint(0, 999_999):06d}"
