"""A made-up shop's catalogue of any size, and briefs that ask it for items: for demos and benchmarks.

An item is a product of a brand with modifiers, so items share long beginnings, as real ones do. Brands have
Zipf's shares of the items: a few are everywhere. Equal arguments give equal items; texts are distinct.
"""

import csv
import io
import math
from collections.abc import Iterator

import msgspec
import numpy as np

from cluster.messages import Record

_FIRST_WORDS = (
    "North", "West", "Green", "Blue", "Red", "Black", "White", "Gold", "Silver", "Star", "Sun", "Moon",
    "River", "Stone", "Forest", "Mountain", "Ocean", "City", "Royal", "Pure", "True", "Bright",
    "Wild", "Grand",
)  # fmt: skip
_SECOND_WORDS = (
    "field", "wood", "line", "house", "way", "point", "land", "works", " Peak", " Lane", " & Co", " Studio",
    " Home", " Lab", " Road", " Park",
)  # fmt: skip
_PRODUCTS = (
    ("shoes", "running shoes"), ("shoes", "hiking boots"), ("shoes", "sneakers"), ("shoes", "sandals"),
    ("clothes", "rain jacket"), ("clothes", "wool sweater"), ("clothes", "jeans"), ("clothes", "socks"),
    ("bags", "backpack"), ("bags", "travel suitcase"), ("bags", "laptop bag"), ("sport", "yoga mat"),
    ("sport", "tennis racket"), ("sport", "folding bicycle"), ("sport", "bicycle helmet"), ("sport", "tent"),
    ("kitchen", "coffee machine"), ("kitchen", "electric kettle"), ("kitchen", "frying pan"),
    ("kitchen", "knife set"), ("electronics", "wireless headphones"), ("electronics", "smart watch"),
    ("electronics", "phone case"), ("electronics", "power bank"), ("home", "desk lamp"),
    ("home", "office chair"), ("home", "bath towel"), ("home", "wool blanket"), ("beauty", "face cream"),
    ("beauty", "shampoo"), ("toys", "wooden train"), ("toys", "board game"),
)  # fmt: skip
_FOR_WHOM = (
    "",
    " for women",
    " for men",
    " for kids",
    " for beginners",
    " for travel",
    " for work",
    " for gifts",
)
_COLOURS = (
    "",
    " black",
    " white",
    " red",
    " blue",
    " green",
    " grey",
    " brown",
    " pink",
    " yellow",
    " silver",
)
_QUALITIES = (
    "",
    ", sale",
    ", new",
    ", large",
    ", small",
    ", light",
    ", organic",
    ", used",
    ", premium",
    ", classic",
)
_CONTEXTS = (
    "A reader of an article about {topic} is shown an ad.",
    "Searched for: {topic}.",
    "Last bought: {topic}. Now looks at what goes with it.",
    "A newsletter on {topic}, sent in {season}.",
)
_SEASONS = ("spring", "summer", "autumn", "winter")
_PER_BRAND = len(_PRODUCTS) * len(_FOR_WHOM) * len(_COLOURS) * len(_QUALITIES)
_CHUNK_BYTES = 1 << 16


class SampleItem(Record, frozen=True, kw_only=True):
    id: str
    text: str
    bid: float
    brand: str
    category: str
    price: float
    in_stock: bool


def sample_items(num_items: int, seed: int = 0) -> Iterator[SampleItem]:
    """In no order; memory does not grow with `num_items`."""
    rng = np.random.default_rng(seed)
    shares = _brand_shares(num_items)
    begins = np.concatenate(([0], np.cumsum(shares)))
    brands = _brand_names(len(shares), rng)
    stride = _coprime(num_items, int(rng.integers(1, max(2, num_items))))
    steps = [_coprime(_PER_BRAND, int(rng.integers(_PER_BRAND // 3, _PER_BRAND))) for _ in shares]
    for start in range(0, num_items, 4096):
        places = (np.arange(start, min(start + 4096, num_items), dtype=np.int64) * stride) % num_items
        owners = np.searchsorted(begins, places, side="right") - 1
        money = rng.lognormal(0.0, 0.8, (len(places), 2))
        stock = rng.random(len(places)) < 0.9
        for at, (place, owner) in enumerate(zip(places.tolist(), owners.tolist(), strict=True)):
            combination = (place - int(begins[owner])) * steps[owner] % _PER_BRAND
            category, text = _described(combination)
            yield SampleItem(
                id=f"sku-{place:07d}",
                text=f"{brands[owner]} {text}",
                bid=round(0.4 * float(money[at, 0]), 4),
                brand=brands[owner],
                category=category,
                price=round(30 * float(money[at, 1]), 2),
                in_stock=bool(stock[at]),
            )


def sample_csv(num_items: int, seed: int = 0) -> Iterator[bytes]:
    """An upload, in chunks of about 64 KB."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(SampleItem.__struct_fields__)
    for item in sample_items(num_items, seed):
        writer.writerow([*msgspec.structs.astuple(item)[:-1], "true" if item.in_stock else "false"])
        if buffer.tell() >= _CHUNK_BYTES:
            yield buffer.getvalue().encode()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue().encode()


def sample_jsonl(num_items: int, seed: int = 0) -> Iterator[bytes]:
    """The same items as an upload of JSON lines."""
    chunk = bytearray()
    for item in sample_items(num_items, seed):
        chunk += msgspec.json.encode(item) + b"\n"
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    yield bytes(chunk)


def sample_briefs(num_briefs: int, seed: int = 0) -> list[str]:
    """Contexts to choose items for."""
    rng = np.random.default_rng(seed)
    briefs = []
    for _ in range(num_briefs):
        context = _CONTEXTS[rng.integers(len(_CONTEXTS))]
        _, product = _PRODUCTS[_zipf(rng, len(_PRODUCTS))]
        whom = _FOR_WHOM[rng.integers(len(_FOR_WHOM))]
        season = _SEASONS[rng.integers(len(_SEASONS))]
        briefs.append(f"{context.format(topic=product + whom, season=season)} The item that fits best:")
    return briefs


def _described(combination: int) -> tuple[str, str]:
    combination, quality = divmod(combination, len(_QUALITIES))
    combination, colour = divmod(combination, len(_COLOURS))
    product, whom = divmod(combination, len(_FOR_WHOM))
    category, name = _PRODUCTS[product]
    return category, name + _FOR_WHOM[whom] + _COLOURS[colour] + _QUALITIES[quality]


def _brand_shares(num_items: int) -> list[int]:
    """Items of each brand: Zipf's, as far as a brand has so many."""
    num_brands = max(1, math.isqrt(num_items) // 2, -(-2 * num_items // _PER_BRAND))
    weights = 1.0 / np.arange(1, num_brands + 1)
    shares = np.minimum(np.floor(num_items * weights / weights.sum()), _PER_BRAND).astype(np.int64)
    left = num_items - int(shares.sum())
    for brand in range(num_brands):
        more = min(left, _PER_BRAND - int(shares[brand]))
        shares[brand] += more
        left -= more
    assert left == 0
    return [int(share) for share in shares if share]


def _brand_names(count: int, rng: np.random.Generator) -> list[str]:
    names = [first + second for first in _FIRST_WORDS for second in _SECOND_WORDS]
    rng.shuffle(names)
    return [
        names[i % len(names)] + (f" {i // len(names) + 1}" if i >= len(names) else "") for i in range(count)
    ]


def _coprime(modulus: int, wish: int) -> int:
    """The first number from `wish` on whose multiples visit all residues."""
    while math.gcd(wish, modulus) != 1:
        wish += 1
    return wish


def _zipf(rng: np.random.Generator, count: int) -> int:
    weights = 1.0 / np.arange(1, count + 1)
    return int(rng.choice(count, p=weights / weights.sum()))
