"""Prompts of `benchmarks/creatives.py`, as an ad system would send them: most with examples."""

ADS = (
    "Tired of heavy bags on the train? The Lumo folding bicycle weighs nine kilos, folds in eight seconds"
    " and fits under every seat. Order before Friday and get a free lock, two years of service and home "
    "delivery.",
    "Fresh coffee, roasted on Tuesday, at your door on Thursday. Choose three bags from our farms in "
    "Peru, Kenya and Vietnam, pause whenever you like, and pay for shipping only once. Your first bag is "
    "on us.",
    "Winter is coming, and so is the new Alpina jacket: warm down to minus twenty, light as a shirt and "
    "made from recycled bottles. Try it at home for thirty days. If it does not keep you warm, send it "
    "back.",
    "Learn Spanish in fifteen minutes a day with real teachers from Madrid, Lima and Mexico City. No "
    "homework, no grammar books, just conversations about things you care about. The first week costs "
    "nothing at all.",
    "Our kitchen knives are forged by hand in a small workshop in Solingen, sharpened nine times and "
    "tested on ripe tomatoes. They stay sharp for years, and when they do not, we sharpen them for free, "
    "for life.",
    "Sleep better tonight. The Nuvola mattress adapts to your back, stays cool in summer and comes in a "
    "box that fits through any door. Sleep on it for a hundred nights and decide then whether you want to"
    " keep it.",
    "The Garda electric kettle boils a litre of water in ninety seconds, keeps it hot for two hours and "
    "turns itself off when it is empty. It comes in four colours, with a five year warranty and free "
    "returns.",
    "Plant a garden on your balcony: six herbs, three kinds of lettuce and a chilli that will surprise "
    "your friends. Everything comes in one box, with soil, pots and a calendar that tells you when to "
    "water.",
)

PRODUCTS = ("folding bicycle", "coffee subscription", "winter jacket", "language course", "kitchen knife")
AUDIENCES = ("commuters", "young parents", "remote workers", "hikers", "teachers", "small offices")

_REWRITE = """Each text is written again with the price at its end.

Text: The Brisa desk fan is quiet, small and strong. It runs for ten hours and charges over lunch.
Again: The Brisa desk fan is quiet, small and strong. It runs for ten hours and charges over lunch. 29 euros.

Text: {ad}
Again:"""

_TEMPLATE = """Product: mattress
For: students
Ad: Sleep better tonight, students! Our mattress is delivered free to your door within 48 hours. Order today \
and save 20 percent on your first purchase. Offer ends Sunday.

Product: kettle
For: nurses
Ad: Hot tea in a minute, nurses! Our kettle is delivered free to your door within 48 hours. Order today \
and save 20 percent on your first purchase. Offer ends Sunday.

Product: {product}
For: {audience}
Ad:"""

_UNPROMPTED = """<|im_start|>system
You write ads.<|im_end|>
<|im_start|>user
Write a short advertisement for our {product}, for {audience}.<|im_end|>
<|im_start|>assistant
"""


def rewrite_prompts() -> list[str]:
    """Advertisements to be handed back with a small edit."""
    return [_REWRITE.format(ad=ad) for ad in ADS]


def template_prompts() -> list[str]:
    """One campaign's: product and audience differ, what the house always says does not."""
    return [
        _TEMPLATE.format(product=product, audience=audience) for product in PRODUCTS for audience in AUDIENCES
    ]


def unprompted_prompts() -> list[str]:
    """Nothing of what is written stands in them, but the product and the audience."""
    return [
        _UNPROMPTED.format(product=product, audience=audience)
        for audience in AUDIENCES
        for product in PRODUCTS
    ]
