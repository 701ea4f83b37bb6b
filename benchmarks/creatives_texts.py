"""Prompts of `benchmarks/creatives.py`, as an ad system would send them."""

ADS = (
    "Tired of heavy bags on the train? The Lumo folding bicycle weighs nine kilos, folds in eight seconds and "
    "fits under every seat. Order before Friday and get a free lock, two years of service and home delivery.",
    "Fresh coffee, roasted on Tuesday, at your door on Thursday. Choose three bags from our farms in Peru, "
    "Kenya and Vietnam, pause whenever you like, and pay for shipping only once. Your first bag is on us.",
    "Winter is coming, and so is the new Alpina jacket: warm down to minus twenty, light as a shirt and made "
    "from recycled bottles. Try it at home for thirty days. If it does not keep you warm, send it back.",
    "Learn Spanish in fifteen minutes a day with real teachers from Madrid, Lima and Mexico City. No homework, "
    "no grammar books, just conversations about things you care about. The first week costs nothing at all.",
    "Our kitchen knives are forged by hand in a small workshop in Solingen, sharpened nine times and tested on "
    "ripe tomatoes. They stay sharp for years, and when they do not, we sharpen them for free, for life.",
    "Sleep better tonight. The Nuvola mattress adapts to your back, stays cool in summer and comes in a box "
    "that fits through any door. Sleep on it for a hundred nights and decide then whether you want to keep it.",
    "The Garda electric kettle boils a litre of water in ninety seconds, keeps it hot for two hours and turns "
    "itself off when it is empty. It comes in four colours, with a five year warranty and free returns.",
    "Plant a garden on your balcony: six herbs, three kinds of lettuce and a chilli that will surprise your "
    "friends. Everything comes in one box, with soil, pots and a calendar that tells you when to water.",
)

PRODUCTS = (
    "folding bicycle", "coffee subscription", "winter jacket", "language course", "kitchen knife", "mattress",
)  # fmt: skip
AUDIENCES = (
    "commuters", "students", "young parents", "retired couples", "night-shift nurses", "remote workers",
    "weekend hikers", "first-time buyers", "small offices", "city cyclists", "frequent travellers", "teachers",
)  # fmt: skip


def rewrite_prompt(ad: str) -> str:
    """An advertisement to be handed back with small edits, which a small model mostly copies."""
    return f"Correct the spelling of this advertisement. Answer with the advertisement only.\n\n{ad}"


def template_prompt(product: str, audience: str) -> str:
    """One of a campaign's: all of them but the audience is the same."""
    return f"Write a short, friendly advertisement for a {product}. The readers are {audience}."
